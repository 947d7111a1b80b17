/** The lanes of an expert: who holds each, what is accepted, and when they are merged. */

import type { Merge, ShardStatus } from './api'
import { short, span } from './format'

const ORDER = ['merging', 'gathered', 'training', 'claimed', 'late']
/** What people read for a state; one that is not known here is shown as it is. */
const WORDS: Record<string, string> = { gathered: 'accepted, waits for the merge', merging: 'accepted, being merged', late: 'late: the others are merged without it' }

/** How many lanes are in which state, in a few words. */
export function laneWords({ lanes = [], merge }: ShardStatus): string {
  const states = [...new Set([...ORDER, ...lanes.map((lane) => lane.state)])]
  const counts = states.map((state) => [state, lanes.filter((lane) => lane.state === state).length] as const).filter(([, many]) => many)
  const free = (merge?.lanes ?? lanes.length) - lanes.length
  return `${merge?.lanes ?? lanes.length} lanes: ${[...counts.map(([state, many]) => `${many} ${state}`), ...(free ? [`${free} free`] : [])].join(', ')}`
}

function next({ quorum, lanes, gathered, deadline, due }: Merge, now: number): string {
  const enough = `${quorum} of ${lanes} accepted results are enough for the next epoch.`
  if (due === null) return `${enough} The merge comes ${span(deadline)} after the first at the latest.`
  return `${enough} ${gathered === 1 ? '1 is' : `${gathered} are`} there, and ${due > now ? `merged in ${span(due - now)} at the latest` : 'the merge is due'} (deadline: ${span(deadline)} after the first).`
}

export function Lanes({ status, merge, now }: { status: ShardStatus; merge: Merge; now: number }) {
  const lanes = status.lanes ?? []
  return (
    <>
      <p class="soft">{next(merge, now)}</p>
      {lanes.length > 0 && (
        <div class="scroll" tabIndex={0}>
          <table class="lanes">
            <caption>Lanes at which nodes work, or whose results are there</caption>
            <thead><tr><th scope="col">lane</th><th scope="col">node</th><th scope="col">state</th><th scope="col">in the newest epoch</th></tr></thead>
            <tbody>
              {lanes.map((lane) => (
                <tr key={lane.lane}>
                  <th scope="row">{lane.lane}</th><td><a href={`#peer=${lane.owner}`}><code>{short(lane.owner)}</code></a></td>
                  <td class={lane.state === 'late' ? 'bad' : ''}>{WORDS[lane.state] ?? lane.state}</td><td>{lane.merged ? 'merged' : 'no'}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </>
  )
}

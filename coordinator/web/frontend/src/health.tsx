import type { Everything, Stall } from './api'
import { ago, expert } from './format'
import { pace } from './past'

interface Line { level: 'red' | 'amber'; what: string; since: string; why: string; todo: string }

/** Everything that is wrong, red first. */
export function problems(all: Everything): Line[] {
  const now = all.run.time
  const lines = together(all.run.stalls, now)
  for (const shard of all.shards) {
    const { status, accepted, refused } = shard
    const usual = pace(accepted)
    const stalled = all.run.stalls.some((stall) => stall.shard === status.shard)
    if (!stalled && status.state !== 'done' && usual !== null && status.last_accepted !== null && now - status.last_accepted > 3 * usual) {
      lines.push({ level: 'red', what: `expert ${expert(status.shard)}`, since: ago(status.last_accepted, now), why: 'No result was accepted for three times its usual pace.', todo: `lutetia run why ${status.shard}` })
    }
    const twice = refused.find((point, i) => refused.some((other, j) => j < i && other.checkpoint === point.checkpoint && other.owner !== point.owner))
    if (twice) lines.push({ level: 'red', what: `expert ${expert(status.shard)}`, since: ago(twice.time, now), why: `Two peers made the same result, and it was refused (${twice.check}).`, todo: `lutetia run why ${status.shard}` })
    if (status.copies === 1) lines.push({ level: 'amber', what: `expert ${expert(status.shard)}`, since: '', why: 'Only one volunteer holds a copy of its checkpoint.', todo: 'More volunteers, or the coordinator’s own backup.' })
  }
  const versions = new Set(all.peers.flatMap((peer) => (peer.node ? [peer.node.software] : [])))
  if (versions.size > 1) lines.push({ level: 'amber', what: 'versions', since: '', why: `Peers run ${[...versions].sort().join(', ')}.`, todo: 'Older ones are welcome as long as they work.' })
  return lines.sort((a, b) => Number(a.level === 'amber') - Number(b.level === 'amber'))
}

/** One line for all stalls of the same kind and cause. */
function together(stalls: Stall[], now: number): Line[] {
  const groups = new Map<string, Stall[]>()
  for (const stall of stalls) groups.set(`${stall.kind}|${stall.why}|${stall.remedy}`, [...(groups.get(`${stall.kind}|${stall.why}|${stall.remedy}`) ?? []), stall])
  return [...groups.values()].map((alike) => {
    const names = alike.map(name)
    const what = names.length > 4 ? `${names.slice(0, 3).join(', ')} and ${names.length - 3} more` : names.join(', ')
    return { level: 'red', what, since: ago(Math.min(...alike.map((stall) => stall.since)), now), why: alike[0]!.why, todo: alike[0]!.remedy }
  })
}

function name(stall: Stall): string {
  if (stall.kind === 'node') return `node ${(stall.owner ?? '?').slice(0, 8)}`
  return stall.kind === 'shard' ? `expert ${expert(stall.shard ?? 0)}` : `${stall.kind} of expert ${expert(stall.shard ?? 0)} epoch ${stall.epoch}`
}

export function Health({ all }: { all: Everything }) {
  const lines = problems(all)
  return (
    <section aria-labelledby="health">
      <h2 id="health">Health</h2>
      {lines.length === 0 ? <p class="good">Nothing stands still.</p> : (
        <ul class="health">
          {lines.map((line, i) => (
            <li key={i} class={line.level}>
              <strong>{line.level === 'red' ? 'Red' : 'Note'}: {line.what}</strong>{line.since && <span class="soft"> · {line.since}</span>}
              <br />{line.why} <span class="todo">{line.todo}</span>
            </li>
          ))}
        </ul>
      )}
    </section>
  )
}

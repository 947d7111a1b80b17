import { exported, type Everything, type Stall } from './api'
import { ago, bytes, expert, span } from './format'
import { last, pace, type Moment } from './past'

interface Line { level: 'red' | 'amber'; what: string; since: string; why: string; todo: string }

/** Everything that is wrong at the moment, red first. What only live records show is known of the present alone. */
export function problems(all: Everything, moment: Moment): Line[] {
  const { run } = all
  const lines = moment.present ? [...together(run.stalls, moment.now), ...ofTheCoordinator(all)] : []
  const slow: { shard: number; since: number; usual: number }[] = []
  for (const shard of moment.shards) {
    const { status, accepted, refused } = shard
    const usual = pace(accepted)
    const newest = last(accepted)
    const stalled = moment.present && run.stalls.some((stall) => stall.shard === status.shard && stall.kind === 'shard')
    if (!stalled && newest && newest.epoch < status.epochs && run.state !== 'finished' && usual !== null && moment.now - newest.time > 3 * usual) {
      slow.push({ shard: status.shard, since: newest.time, usual })
    }
    const twice = refused.find((point, i) => refused.some((other, j) => j < i && other.checkpoint === point.checkpoint))
    if (twice && (newest?.time ?? 0) < twice.time) lines.push({ level: 'red', what: `expert ${expert(status.shard)}`, since: ago(twice.time, moment.now), why: `The same result was refused twice (${twice.check}), and none was accepted since.`, todo: `lutetia run why RUN ${status.shard}` })
    if (moment.present && status.copies === 1) lines.push({ level: 'amber', what: `expert ${expert(status.shard)}`, since: '', why: 'Only one volunteer holds a copy of its checkpoint.', todo: 'More volunteers, or a backup: lutetia coordinator backup.' })
  }
  return [...lines, ...slower(slow, moment.now)].sort((a, b) => Number(a.level === 'amber') - Number(b.level === 'amber'))
}

/** A line for each expert that is slower than it was, or one for all where they are many. */
function slower(slow: { shard: number; since: number; usual: number }[], now: number): Line[] {
  const names = slow.map(({ shard }) => `expert ${expert(shard)}`)
  if (slow.length > MOST_NAMES) {
    const paces = slow.map(({ usual }) => usual)
    const [shortest, longest] = [span(Math.min(...paces)), span(Math.max(...paces))]
    const since = ago(Math.min(...slow.map(({ since }) => since)), now)
    return [{ level: 'red', what: listed(names), since, why: `No result was accepted for three times its usual pace, one in ${shortest} to ${longest}.`, todo: 'lutetia run why RUN SHARD' }]
  }
  return slow.map(({ shard, since, usual }, i) => ({ level: 'red', what: names[i]!, since: ago(since, now), why: `No result was accepted for three times its usual pace, one in ${span(usual)}.`, todo: `lutetia run why RUN ${shard}` }))
}

const MOST_NAMES = 4

function listed(names: string[]): string {
  return names.length > MOST_NAMES ? `${names.slice(0, 3).join(', ')} and ${names.length - 3} more` : names.join(', ')
}

function ofTheCoordinator({ run, peers }: Everything): Line[] {
  const lines: Line[] = []
  if (run.disk_free_bytes !== null && run.disk_free_bytes < run.disk_needed_bytes) {
    lines.push({ level: 'red', what: 'disk of the coordinator', since: '', why: `${bytes(run.disk_free_bytes)} are free; the next results of all experts may need ${bytes(run.disk_needed_bytes)}.`, todo: 'Free space, or move the run to a larger disk.' })
  }
  const down = run.bootstrap ?? []
  for (const fault of down) lines.push({ level: 'red', what: 'bootstrap', since: ago(fault.since, run.time), why: `${fault.address} of the ticket does not answer: ${fault.why}.`, todo: 'Try it from another machine: lutetia doctor TICKET.' })
  if (down.length === 0 && run.peers_online === 0 && run.peers_day > 0 && run.state !== 'finished') {
    lines.push({ level: 'red', what: 'bootstrap', since: '', why: 'No peer is online, though some were within 24 hours: the ticket’s address may not be reached from outside.', todo: 'Check its port from another machine: lutetia doctor TICKET.' })
  }
  if (run.expires < run.time) lines.push({ level: 'red', what: 'manifest', since: ago(run.expires, run.time), why: 'The manifest has expired: nobody can join.', todo: 'lutetia run upgrade' })
  if (run.reach === 'machine') lines.push({ level: 'amber', what: 'bootstrap', since: '', why: 'The ticket names addresses of this machine alone: nobody else can join.', todo: 'Name a public address when the run is created.' })
  const versions = new Set(peers.flatMap((peer) => (peer.node ? [peer.node.software] : [])))
  if (versions.size > 1) lines.push({ level: 'amber', what: 'versions', since: '', why: `Peers run ${[...versions].sort().join(', ')}.`, todo: 'Older ones are welcome as long as they work.' })
  return lines
}

/** One line for all stalls of the same kind and cause. */
function together(stalls: Stall[], now: number): Line[] {
  const groups = new Map<string, Stall[]>()
  for (const stall of stalls) groups.set(`${stall.kind}|${stall.why}|${stall.remedy}`, [...(groups.get(`${stall.kind}|${stall.why}|${stall.remedy}`) ?? []), stall])
  return [...groups.values()].map((alike) => {
    return { level: 'red', what: listed(alike.map(name)), since: ago(Math.min(...alike.map((stall) => stall.since)), now), why: alike[0]!.why, todo: alike[0]!.remedy }
  })
}

function name(stall: Stall): string {
  if (stall.kind === 'node') return `node ${(stall.owner ?? '?').slice(0, 8)}`
  return stall.kind === 'shard' ? `expert ${expert(stall.shard ?? 0)}` : `${stall.kind} of expert ${expert(stall.shard ?? 0)} epoch ${stall.epoch}`
}

export function Health({ all, moment }: { all: Everything; moment: Moment }) {
  const lines = problems(all, moment)
  const when = moment.present ? (exported ? ' when this page was exported' : '') : ' at that moment, as far as the ledger says'
  return (
    <section aria-labelledby="health">
      <h2 id="health">Health</h2>
      {lines.length === 0 ? <p class="good">Nothing stands still{when}.</p> : (
        <ul class="health">
          {lines.map((line, i) => (
            <li key={i} class={line.level}>
              <strong>{line.level === 'red' ? 'Red' : 'Note'}: {line.what}</strong>{line.since && <span class="soft"> · {line.since}</span>}
              <br /><span dir="auto">{line.why}</span> <span class="todo">{line.todo}</span>
            </li>
          ))}
        </ul>
      )}
    </section>
  )
}

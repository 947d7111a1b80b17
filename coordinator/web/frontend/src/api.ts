/** What the coordinator serves below /api/v1, and how this page reads it. Times are Unix seconds. */

/** Of results that came before the page was opened, what is optional is read when somebody looks at their expert. */
export interface Accepted {
  event: number; time: number; shard: number; epoch: number; samples: number; trained: number; loss: number; author: string
  weights_size: number; void: boolean; void_event: number | null; weights?: string; note?: string
}
export interface Refused {
  event: number; time: number; shard: number; epoch: number; checkpoint: string; check: string; owner?: string; verdict?: string; text?: string
}
export interface Stall { kind: string; shard: number | null; epoch: number | null; owner: string | null; since: number; why: string; remedy: string }
export interface Run {
  run: string; name: string; owner: string; coordinator: string; software: string; manifest_version: number; created: number
  expires: number; time: number; state: 'training' | 'stalled' | 'stitching' | 'finished' | 'paused'; experts: number; samples: number
  samples_budget: number; samples_per_second: number; arrival: { seconds: number | null; basis: string }; peers_working: number
  peers_online: number; peers_day: number; accepted: number; rejected: number; events: number; ticket: string; join: string
  memory_bytes: number; disk_bytes: number; stalls: Stall[]; about: string; bytes_accepted: number; disk_free_bytes: number | null
  disk_needed_bytes: number; reach: 'machine' | 'network' | 'anyone' | null
  bootstrap?: { address: string; since: number; why: string }[]
}
export interface ShardStatus {
  shard: number; name: string; epoch: number; epochs: number; samples: number; samples_budget: number; state: string
  owner: string | null; holdout_loss: number | null; last_accepted: number | null; initial_loss: number | null; waiting: number
  audit: string | null; copies: number | null; lanes?: Lane[]; merge?: Merge | null
}
/** In a run with lanes: one at which a node works or whose result is there, and the next merge. */
export interface Lane { lane: number; owner: string; state: string; merged?: boolean }
export interface Merge { lanes: number; quorum: number; gathered: number; deadline: number; due: number | null }
export interface Shard {
  status: ShardStatus; clips: number; prior: number; expert: string; initial_loss: number | null; accepted: Accepted[]; refused: Refused[]
  sheet: string | null; whole: boolean; flops: number | null
}
export interface Shards { events: number; shards: Shard[] }
/** All results, as columns of numbers; see the API's description. */
interface Columns { event: number[]; time: number[]; shard: number[]; epoch: number[] }
interface Segment {
  authors: string[]; voids: [number, number][]; refused: Columns & { checkpoint: string[]; check: string[] }
  accepted: Columns & { samples: number[]; trained: number[]; loss: number[]; author: number[]; weights_size: number[] }
}
export interface History { events: number; segments: Segment[] }
export interface Node { state: string; health: string; device: string; samples_per_second: number; shard: number | null; software: string; link: string | null }
export interface Peer {
  owner: string; peer_id: string; node: Node | null; samples: number; accepted: number; void: number; invalid: number
  last_accepted: number | null; quarantined: string | null; name?: string; credit?: Credit
}
/** In FLOPs; `recent`: per day. */
export interface Credit { total: number; epochs: number; audits: number; copies: number; recent: number }
export interface Superseded { event: number; time: number; shard: number; epoch: number; by: string }
export interface Audit { event: number; time: number; shard: number; epoch: number; outcome: string; text: string }
export interface PeerHistory extends Peer { points: Accepted[]; refused: Refused[]; superseded: Superseded[]; audits: Audit[] }
export interface Router { event: number; time: number; accuracy: number; accuracy_by_time: number[]; calibration_error: number | null; router: string }
export interface Series { routers: Router[]; throughput: { time: number; samples: number; results: number }[] }
export interface EventLine { event: number; time: number; kind: string; text: string }
export interface RealClip { url: string; caption: string; same: boolean; similarity: number; shard: number }
export interface Clip { prompt: string; file: string; url: string; seed: number; experts: [number, number][][]; real: RealClip | null }
export interface Stitch { mixture: string; event: number; time: number; epochs: number[] }
export interface Pictures { mixture: string | null; clips: Clip[]; stitches: Stitch[] }

export interface Everything { run: Run; shards: Shard[]; peers: Peer[]; peersTotal: number; series: Series; pictures: Pictures }

/** Events are read in pages of so many; the first page has number 0. */
export const EVENTS_OF_PAGE = 500

/** Set in the page of a static export, whose documents are scripts below data/, since a page from a file may not fetch any other. */
export const exported = 'export' in document.documentElement.dataset

const waiting = new Map<string, (document: unknown) => void>()

function script(name: string): Promise<unknown> {
  return new Promise((resolve, reject) => {
    const element = document.createElement('script')
    waiting.set(name, resolve)
    element.onload = () => element.remove()
    element.onerror = () => { waiting.delete(name); element.remove(); reject(new Error('this export has no such page')) }
    element.src = `data/${name}.js`
    document.head.append(element)
  })
}

if (exported) {
  Object.assign(globalThis, { lutetia: (name: string, found: unknown) => { waiting.get(name)?.(found); waiting.delete(name) } })
}

/** The document at `path` below /api/v1; in an export, the one of this name without its query. */
export async function get<T>(path: string): Promise<T> {
  if (exported) return (await script(path.split('?')[0]!)) as T
  const answer = await fetch(`api/v1/${path}`)
  if (!answer.ok) {
    const problem = (await answer.json().catch(() => null)) as { detail?: unknown } | null
    throw new Error(typeof problem?.detail === 'string' ? problem.detail : `the server answered ${answer.status}`)
  }
  return (await answer.json()) as T
}

/** A link of the API, relative to this page, which may lie below a path. */
export function linked(url: string): string {
  return url.replace(/^\//, '')
}

const PEERS_SHOWN = 200
const REFUSED_SHOWN = 200
/** Digits of a result's digest that tell it from others. */
const DIGITS = 12
/** Who has not read for more events reads everything again; the coordinator sends what came after so many. */
const RECENT_EVENTS = 1500
let kept: Everything | null = null
let histories: Shards | null = null

/** The results of each shard as the columns tell them. */
export function unfold(history: History): Map<number, Pick<Shard, 'accepted' | 'refused'>> {
  const shards = new Map<number, Pick<Shard, 'accepted' | 'refused'>>()
  const of = (index: number) => {
    const found = shards.get(index) ?? { accepted: [], refused: [] }
    shards.set(index, found)
    return found
  }
  const authors: string[] = []
  const points = new Map<number, Accepted>()
  for (const { authors: more, accepted: a, refused: r, voids } of history.segments) {
    authors.push(...more)
    a.event.forEach((event, i) => {
      const point = { event, time: a.time[i]!, shard: a.shard[i]!, epoch: a.epoch[i]!, samples: a.samples[i]!, trained: a.trained[i]!, loss: a.loss[i]!, author: authors[a.author[i]!]!, weights_size: a.weights_size[i]!, void: false, void_event: null }
      points.set(event, point)
      of(point.shard).accepted.push(point)
    })
    r.event.forEach((event, i) => of(r.shard[i]!).refused.push({ event, time: r.time[i]!, shard: r.shard[i]!, epoch: r.epoch[i]!, checkpoint: r.checkpoint[i]!, check: r.check[i]! }))
    for (const [by, event] of voids) Object.assign(points.get(event)!, { void: true, void_event: by })
  }
  return shards
}

/** What is known of the shards, and what came after it. */
export function together(known: Shards, found: Shards): Shards {
  const shards = found.shards.map((shard, i) => {
    const before = known.shards[i]
    const refused = shard.refused.map((point) => ({ ...point, checkpoint: point.checkpoint.slice(0, DIGITS) }))
    if (shard.whole || !before) return { ...shard, refused }
    return { ...shard, whole: true, accepted: [...before.accepted, ...shard.accepted], refused: [...before.refused, ...refused].slice(-REFUSED_SHOWN) }
  })
  return { events: found.events, shards }
}

async function readShards(head: number): Promise<Shards> {
  if (histories && (exported || head - histories.events < RECENT_EVENTS)) {
    histories = together(histories, await get<Shards>(`shards?after=${histories.events}`))
    return histories
  }
  const history = await get<History>('history')
  const of = unfold(history)
  const found = await get<Shards>(`shards?after=${history.events}`)
  const known = found.shards.map((shard) => ({ ...shard, ...(of.get(shard.status.shard) ?? { accepted: [], refused: [] }) }))
  histories = together({ events: history.events, shards: known }, found)
  return histories
}

export async function readAll(): Promise<Everything> {
  if (exported && kept) return kept
  const asked = get<Run>('run')
  const [run, shards, peers, series, pictures] = await Promise.all([
    asked, asked.then((found) => readShards(found.events)), get<{ total: number; peers: Peer[] }>(`peers?limit=${PEERS_SHOWN}`),
    get<Series>('metrics?losses=false'), get<Pictures>('gallery'),
  ])
  kept = { run, shards: shards.shards, peers: peers.peers, peersTotal: peers.total, series, pictures }
  return kept
}

/** One expert with its last results before an event, and all that is known of them. */
export function readShard(index: number, before: number): Promise<Shard> {
  return get<Shard>(`shards/${index}?before=${before}&last=${REFUSED_SHOWN}`)
}

/** The public key of a peer that is named by its peer id, as an export, which has no server to look it up, knows it. */
export function ownerOf(who: string): string {
  return (exported && kept?.peers.find((peer) => peer.peer_id === who)?.owner) || who
}

const pages = new Map<number, EventLine[]>()

/** One page of events. Whole pages never change, so they are read once. */
export async function readEvents(page: number): Promise<EventLine[]> {
  const known = pages.get(page)
  if (known) return known
  const path = exported ? `events/${page}` : `events?after=${page * EVENTS_OF_PAGE}&limit=${EVENTS_OF_PAGE}`
  const lines = (await get<{ events: EventLine[] }>(path)).events
  if (exported || lines.length === EVENTS_OF_PAGE) pages.set(page, lines)
  return lines
}

/** Calls `onEvent` for each new event of the ledger, and `onLink` when the connection comes and goes. Returns how to end it. */
export function follow(onEvent: () => void, onLink: (up: boolean) => void): () => void {
  if (exported) return () => {}
  const stream = new EventSource('api/v1/events/stream')
  stream.addEventListener('ledger', onEvent)
  stream.addEventListener('open', () => onLink(true))
  stream.addEventListener('error', () => onLink(false))
  return () => stream.close()
}

/** What the coordinator serves below /api/v1, and how this page reads it. Times are Unix seconds. */

export interface Accepted {
  event: number; time: number; shard: number; epoch: number; samples: number; trained: number; loss: number
  parent_loss: number | null; author: string; checkpoint: string; weights: string; weights_size: number; note: string; void: boolean
}
export interface Refused {
  event: number; time: number; shard: number; epoch: number; owner: string; checkpoint: string; verdict: string; check: string; text: string
}
export interface Stall { kind: string; shard: number | null; epoch: number | null; owner: string | null; since: number; why: string; remedy: string }
export interface Run {
  run: string; name: string; owner: string; coordinator: string; software: string; manifest_version: number; created: number
  expires: number; time: number; state: 'training' | 'stalled' | 'stitching' | 'finished'; experts: number; samples: number
  samples_budget: number; samples_per_second: number; arrival: { seconds: number | null; basis: string }; peers_working: number
  peers_online: number; peers_day: number; accepted: number; rejected: number; events: number; ticket: string; join: string
  memory_bytes: number; disk_bytes: number; stalls: Stall[]
}
export interface ShardStatus {
  shard: number; name: string; epoch: number; epochs: number; samples: number; samples_budget: number; state: string
  owner: string | null; holdout_loss: number | null; last_accepted: number | null; initial_loss: number | null; waiting: number
  audit: string | null; copies: number | null
}
export interface Shard {
  status: ShardStatus; clips: number; prior: number; expert: string; initial_loss: number | null; accepted: Accepted[]; refused: Refused[]
}
export interface Node { state: string; health: string; device: string; samples_per_second: number; shard: number | null; software: string; link: string | null }
export interface Peer {
  owner: string; peer_id: string; node: Node | null; samples: number; accepted: number; void: number; invalid: number
  last_accepted: number | null; quarantined: string | null
}
export interface Superseded { event: number; time: number; shard: number; epoch: number; by: string }
export interface Audit { event: number; time: number; shard: number; epoch: number; outcome: string; text: string }
export interface PeerHistory extends Peer { points: Accepted[]; refused: Refused[]; superseded: Superseded[]; audits: Audit[] }
export interface Router { event: number; time: number; accuracy: number; accuracy_by_time: number[]; calibration_error: number | null; router: string }
export interface Series { routers: Router[]; throughput: { time: number; samples: number; results: number }[] }
export interface EventLine { event: number; time: number; kind: string; text: string }
export interface Clip { prompt: string; file: string; url: string; seed: number }

export interface Everything { run: Run; shards: Shard[]; peers: Peer[]; peersTotal: number; series: Series; clips: Clip[]; events: EventLine[] }

const PEERS_SHOWN = 200
const EVENTS_SHOWN = 400

export async function get<T>(path: string): Promise<T> {
  const answer = await fetch(`api/v1/${path}`)
  if (!answer.ok) {
    const problem = (await answer.json().catch(() => null)) as { detail?: unknown } | null
    throw new Error(typeof problem?.detail === 'string' ? problem.detail : `the coordinator answered ${answer.status}`)
  }
  return (await answer.json()) as T
}

export async function readAll(): Promise<Everything> {
  const [run, shards, peers, series, gallery] = await Promise.all([
    get<Run>('run'), get<{ shards: Shard[] }>('shards'), get<{ total: number; peers: Peer[] }>(`peers?limit=${PEERS_SHOWN}`),
    get<Series>('metrics'), get<{ clips: Clip[] }>('gallery'),
  ])
  const after = Math.max(0, run.events - EVENTS_SHOWN)
  const events = await get<{ events: EventLine[] }>(`events?after=${after}&limit=${EVENTS_SHOWN}`)
  return { run, shards: shards.shards, peers: peers.peers, peersTotal: peers.total, series, clips: gallery.clips, events: events.events }
}

/** Calls `onEvent` for each new event of the ledger, and `onLink` when the connection comes and goes. Returns how to end it. */
export function follow(onEvent: () => void, onLink: (up: boolean) => void): () => void {
  const stream = new EventSource('api/v1/events/stream')
  stream.addEventListener('ledger', onEvent)
  stream.addEventListener('open', () => onLink(true))
  stream.addEventListener('error', () => onLink(false))
  return () => stream.close()
}

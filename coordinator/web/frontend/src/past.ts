/** The run as it was at an event of the ledger: what the time machine shows. */

import type { Accepted, Everything, Peer, Shard, Stitch } from './api'

export interface Hour { time: number; samples: number }

/** `time`: of the last thing that happened; `now`: from which ages are counted; `present`: the newest event is shown. */
export interface Moment {
  event: number; time: number; now: number; present: boolean; shards: Shard[]; samples: number; accepted: number; void: number
  bytes: number; flops: number | null; rate: number; peersDay: number; peers: Peer[]; peersTotal: number; hours: Hour[]; stitch: Stitch | null
}

const HOUR = 3600
const PEERS_SHOWN = 200

/** Everything that happened up to event `until`. */
export function at(all: Everything, until: number): Moment {
  const present = until >= all.run.events
  const shards = all.shards.map((shard) => ({
    ...shard,
    accepted: shard.accepted.filter((point) => point.event <= until).map((point) => (point.void && point.void_event !== null && point.void_event > until ? { ...point, void: false } : point)),
    refused: shard.refused.filter((point) => point.event <= until),
  }))
  const points = shards.flatMap((shard) => shard.accepted)
  const counted = points.filter((point) => !point.void)
  const last = points.reduce((newest, point) => Math.max(newest, point.time), all.run.created)
  const time = present && all.run.state !== 'finished' ? all.run.time : last
  const now = present ? all.run.time : last
  const sum = (given: Accepted[]) => given.reduce((total, point) => total + point.trained, 0)
  const authors = new Set(counted.filter((point) => point.time > now - 24 * HOUR).map((point) => point.author))
  const peers = present ? all.peers : ranked(counted, all.peers)
  return {
    event: until, time, now, present, shards, samples: sum(counted), accepted: counted.length, void: points.length - counted.length,
    bytes: points.reduce((total, point) => total + point.weights_size, 0), rate: sum(counted.filter((point) => point.time > now - HOUR && point.time <= now)) / HOUR,
    flops: shards.some((shard) => shard.flops === null) ? null : shards.reduce((total, shard) => total + shard.flops! * sum(shard.accepted), 0),
    peersDay: authors.size, peers: peers.slice(0, PEERS_SHOWN), peersTotal: present ? all.peersTotal : peers.length, hours: byHour(counted),
    stitch: all.pictures.stitches.filter((each) => each.event <= until).at(-1) ?? null,
  }
}

/** Who had work accepted by then, most first. What else is known of them is of today, and left out. */
function ranked(counted: Accepted[], today: Peer[]): Peer[] {
  const known = new Map(today.map((peer) => [peer.owner, peer]))
  const found = new Map<string, Peer>()
  for (const point of counted) {
    const peer = found.get(point.author) ?? { ...(known.get(point.author) ?? { owner: point.author, peer_id: '' }), node: null, samples: 0, accepted: 0, void: 0, invalid: 0, last_accepted: null, quarantined: null, credit: undefined }
    found.set(point.author, { ...peer, samples: peer.samples + point.trained, accepted: peer.accepted + 1, last_accepted: point.time })
  }
  return [...found.values()].sort((a, b) => b.samples - a.samples)
}

function byHour(counted: Accepted[]): Hour[] {
  const hours = new Map<number, number>()
  for (const point of counted) {
    const hour = Math.floor(point.time / HOUR) * HOUR
    hours.set(hour, (hours.get(hour) ?? 0) + point.trained)
  }
  return [...hours].map(([time, samples]) => ({ time, samples })).sort((a, b) => a.time - b.time)
}

export function last(points: Accepted[]): Accepted | undefined {
  for (let i = points.length - 1; i >= 0; i--) if (!points[i]!.void) return points[i]
  return undefined
}

/** Median seconds between the accepted results of a shard; null with fewer than three. */
export function pace(points: Accepted[]): number | null {
  const gaps = points.slice(1).map((point, i) => point.time - points[i]!.time).sort((a, b) => a - b)
  return gaps.length < 2 ? null : gaps[Math.floor(gaps.length / 2)]!
}

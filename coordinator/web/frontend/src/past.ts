/** The run as it was at an event of the ledger: what the time machine shows. */

import type { Accepted, Everything, Shard } from './api'

/** `time`: of the last thing that happened; `now`: from which ages are counted. */
export interface Moment { event: number; time: number; now: number; shards: Shard[]; samples: number; accepted: number }

/** Everything that happened up to event `until`. Epochs that were rolled back since are shown as void. */
export function at(all: Everything, until: number): Moment {
  const shards = all.shards.map((shard) => ({
    ...shard,
    accepted: shard.accepted.filter((point) => point.event <= until),
    refused: shard.refused.filter((point) => point.event <= until),
  }))
  const points = shards.flatMap((shard) => shard.accepted)
  const counted = points.filter((point) => !point.void)
  const samples = counted.reduce((sum, point) => sum + point.trained, 0)
  const time = until >= all.run.events && all.run.state !== 'finished' ? all.run.time : points.reduce((last, point) => Math.max(last, point.time), all.run.created)
  const now = until >= all.run.events ? all.run.time : time
  return { event: until, time, now, shards, samples, accepted: counted.length }
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

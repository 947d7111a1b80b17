/** Numbers, times and names in words. */

const STEPS: [number, string][] = [[1e18, 'E'], [1e15, 'P'], [1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']]

function scaled(value: number, from: number): string | null {
  const step = value >= from ? STEPS.find(([size]) => value >= size) : undefined
  return step ? `${(value / step[0]).toFixed(1)} ${step[1]}` : null
}

export function count(value: number): string {
  return scaled(value, 1e4) ?? Math.round(value).toLocaleString('en')
}

export function bytes(value: number): string {
  return `${scaled(value, 1e3) ?? `${Math.round(value)} `}B`
}

export function span(seconds: number): string {
  if (seconds < 90) return `${Math.round(seconds)} s`
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`
  if (seconds < 129600) return `${(seconds / 3600).toFixed(1)} h`
  return `${(seconds / 86400).toFixed(1)} days`
}

export function ago(time: number | null, now: number): string {
  return time === null ? 'never' : `${span(Math.max(0, now - time))} ago`
}

/** A time of the run, in UTC. */
export function moment(time: number): string {
  return `${new Date(1000 * time).toISOString().slice(0, 16).replace('T', ' ')} UTC`
}

export function expert(index: number): string {
  return String(index).padStart(3, '0')
}

export function short(key: string): string {
  return key.slice(0, 8)
}

export function rate(value: number): string {
  return value === 0 ? '0' : value >= 10 ? value.toFixed(0) : value.toPrecision(2)
}

/** A colour for each of `count` experts, of like lightness; it is never the only mark. */
export function hue(index: number, of: number): string {
  return `hsl(${Math.round((360 * index) / Math.max(6, of) + 205) % 360} 60% 48%)`
}

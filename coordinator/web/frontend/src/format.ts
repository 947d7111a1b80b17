/** Numbers, times and names in words. */

export function count(value: number): string {
  if (value >= 1e9) return `${(value / 1e9).toFixed(1)} G`
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)} k`
  return Math.round(value).toLocaleString('en')
}

export function bytes(value: number): string {
  return value >= 1e9 ? `${(value / 1e9).toFixed(1)} GB` : `${Math.ceil(value / 1e6)} MB`
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

export function expert(index: number): string {
  return String(index).padStart(3, '0')
}

export function short(key: string): string {
  return key.slice(0, 8)
}

export function rate(value: number): string {
  return value >= 10 ? value.toFixed(0) : value.toPrecision(2)
}

/** A colour for each of `count` experts, of like lightness; it is never the only mark. */
export function hue(index: number, of: number): string {
  return `hsl(${Math.round((360 * index) / Math.max(6, of) + 205) % 360} 60% 48%)`
}

import { useEffect, useRef } from 'preact/hooks'
import uPlot from 'uplot'
import type { Router, Series, Shard } from './api'
import { count, expert, hue, moment as when } from './format'
import type { Hour } from './past'

function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim()
}

export function axes(x: string, y: string): uPlot.Axis[] {
  const common = { stroke: () => colour('--text'), grid: { stroke: () => colour('--line'), width: 1 }, ticks: { stroke: () => colour('--line'), width: 1 } }
  return [{ ...common, label: x, values: (_, at) => at.map((v) => count(v)) }, { ...common, label: y, size: 60 }]
}

/** Draws with uPlot and redraws when data, width or colour scheme change. */
export function Plot({ data, options, label }: { data: uPlot.AlignedData; options: Omit<uPlot.Options, 'width' | 'height'>; label: string }) {
  const place = useRef<HTMLDivElement>(null)
  const plot = useRef<uPlot | null>(null)
  const shape = JSON.stringify(options.series.map((each) => each.label))
  useEffect(() => {
    const box = place.current!
    const made = new uPlot({ ...options, width: Math.max(280, box.clientWidth), height: 260 }, data, box)
    plot.current = made
    const resized = new ResizeObserver(() => made.setSize({ width: Math.max(280, box.clientWidth), height: 260 }))
    resized.observe(box)
    const scheme = matchMedia('(prefers-color-scheme: dark)')
    const redraw = () => made.redraw()
    scheme.addEventListener('change', redraw)
    return () => { resized.disconnect(); scheme.removeEventListener('change', redraw); made.destroy() }
  }, [shape])
  useEffect(() => plot.current?.setData(data), [data])
  return <div class="plot" ref={place} role="img" aria-label={label} />
}

/** Held-out loss against samples, one line per expert. */
export function Curve({ shards, of }: { shards: Shard[]; of: number }) {
  const lines = shards.map((shard) => new Map(shard.accepted.filter((point) => !point.void).map((point) => [point.samples, point.loss])))
  const samples = [...new Set(lines.flatMap((line) => [...line.keys()]))].sort((a, b) => a - b)
  if (samples.length < 2) return <p class="soft">A curve needs two accepted results.</p>
  const data: uPlot.AlignedData = [samples, ...lines.map((line) => samples.map((at) => line.get(at) ?? null))]
  const series: uPlot.Series[] = [
    { label: 'samples', value: (_, v) => (v === null ? '–' : count(v)) },
    ...shards.map((shard) => ({ label: `${expert(shard.status.shard)} ${shard.status.name}`, stroke: hue(shard.status.shard, of), width: 2, spanGaps: true, points: { size: 5 } })),
  ]
  return <Plot data={data} options={{ series, axes: axes('samples of an expert', 'held-out loss'), scales: { x: { time: false } } }} label={`Held-out loss against samples of ${shards.length} experts`} />
}

function Bars({ values, labels, label, most }: { values: number[]; labels: string[]; label: string; most: number }) {
  return (
    <ol class="bars" aria-label={label}>
      {values.map((value, i) => <li key={i} title={`${labels[i]}: ${value.toPrecision(3)}`}><span class="bar" style={{ height: `${(100 * value) / (most || 1)}%` }} /><span class="sr">{labels[i]}: {value.toPrecision(3)}</span></li>)}
    </ol>
  )
}

function RouterBins({ router }: { router: Router }) {
  const bins = router.accuracy_by_time
  const names = bins.map((_, i) => `t ${(i / bins.length).toFixed(1)} to ${((i + 1) / bins.length).toFixed(1)}`)
  return (
    <figure>
      <figcaption>Router: right on {(100 * router.accuracy).toFixed(1)} % of held-out noisy clips; by diffusion time, from data (left) to noise</figcaption>
      <Bars values={bins} labels={names} label="Router accuracy by diffusion time" most={1} />
    </figure>
  )
}

export function Curves({ shards, series, until, hours: every }: { shards: Shard[]; series: Series; until: number; hours: Hour[] }) {
  const router = series.routers.filter((each) => each.event <= until).at(-1)
  const hours = every.slice(-48)
  return (
    <section aria-labelledby="curves">
      <h2 id="curves">Curves</h2>
      <Curve shards={shards} of={shards.length} />
      <div class="pair">
        {router && router.accuracy_by_time.length > 0 && <RouterBins router={router} />}
        {hours.length > 0 && (
          <figure>
            <figcaption>Accepted samples by the hour, the last {hours.length === 1 ? 'hour' : `${hours.length} hours`} with work</figcaption>
            <Bars values={hours.map((hour) => hour.samples)} labels={hours.map((hour) => when(hour.time))} label="Accepted samples by the hour" most={Math.max(...hours.map((hour) => hour.samples))} />
          </figure>
        )}
      </div>
    </section>
  )
}

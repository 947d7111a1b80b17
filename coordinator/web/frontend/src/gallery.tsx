import { useEffect, useRef, useState } from 'preact/hooks'
import { get, linked, type Clip, type Everything, type Pictures } from './api'
import { ago, expert, hue } from './format'
import type { Moment } from './past'

const SETTLE = 150
const STEP = 900

const known = new Map<string, Pictures>()

/** The clips of the mixture that the time machine or the gallery's own slider names; null while they are read. */
function usePictures(all: Everything, mixture: string | null): Pictures | null {
  const [found, setFound] = useState<Pictures | null>(null)
  const newest = mixture === null || mixture === all.pictures.mixture
  useEffect(() => {
    if (newest || !mixture) return
    const kept = known.get(mixture)
    if (kept) { setFound(kept); return }
    let wanted = true
    const timer = setTimeout(() => {
      get<Pictures>(`galleries/${mixture}`).then((pictures) => { known.set(mixture, pictures); if (wanted) setFound(pictures) }, () => undefined)
    }, SETTLE)
    return () => { wanted = false; clearTimeout(timer) }
  }, [mixture, newest])
  return newest ? all.pictures : found
}

/** One animated clip, or its first frame where motion is not wanted. */
function Film({ url, alt, still }: { url: string; alt: string; still: boolean }) {
  const canvas = useRef<HTMLCanvasElement>(null)
  const draw = (image: HTMLImageElement) => {
    image.classList.toggle('tiny', image.naturalWidth <= 160)
    if (!canvas.current) return
    canvas.current.width = image.naturalWidth
    canvas.current.height = image.naturalHeight
    canvas.current.getContext('2d')?.drawImage(image, 0, 0)
  }
  return (
    <span class="film">
      <img key={url + String(still)} src={url} alt={alt} loading={still ? 'eager' : 'lazy'} hidden={still} onLoad={(event) => draw(event.currentTarget)} />
      {still && <canvas ref={canvas} role="img" aria-label={`${alt} (first frame)`} />}
    </span>
  )
}

/** Which expert drew which step, from noise to clip: one column per step, split by the experts' shares. */
function Strip({ clip, of }: { clip: Clip; of: number }) {
  const steps = clip.experts
  if (steps.length === 0) return null
  const runs: string[] = []
  for (const step of steps) {
    const name = step.map(([index]) => expert(index)).join(' and ')
    const open = runs.at(-1)?.split(' for ')
    if (open && open[0] === name) runs[runs.length - 1] = `${name} for ${Number(open[1]) + 1}`
    else runs.push(`${name} for 1`)
  }
  const drawn = [...new Set(steps.flatMap((step) => step.map(([index]) => index)))].sort((a, b) => a - b)
  return (
    <div class="strip">
      <svg viewBox={`0 0 ${steps.length} 1`} preserveAspectRatio="none" role="img" aria-label={`Steps from noise to clip, by expert: ${runs.join(', ')}`}>
        {steps.map((step, x) => {
          let top = 0
          return step.map(([index, share]) => { const y = top; top += share; return <rect key={`${x}-${index}`} x={x} y={y} width={0.94} height={share} style={{ fill: hue(index, of) }} /> })
        })}
      </svg>
      <p class="key">{drawn.map((index) => <span key={index}><span class="dot" style={{ background: hue(index, of) }} />{expert(index)}</span>)}</p>
    </div>
  )
}

function Card({ clip, still, of }: { clip: Clip; still: boolean; of: number }) {
  return (
    <li class="card">
      <p class="prompt" dir="auto" title={clip.prompt}>{clip.prompt}</p>
      <div class={clip.real ? 'beside' : ''}>
        <figure>
          <Film url={linked(clip.url)} alt={`Clip made from the prompt: ${clip.prompt}`} still={still} />
          <figcaption>made by the mixture</figcaption>
        </figure>
        {clip.real && (
          <figure>
            <Film url={linked(clip.real.url)} alt={`Training clip: ${clip.real.caption}`} still={still} />
            <figcaption>{clip.real.same ? 'real, same caption' : <>real, nearest caption: <q dir="auto" title={clip.real.caption}>{clip.real.caption}</q></>}</figcaption>
          </figure>
        )}
      </div>
      <Strip clip={clip} of={of} />
    </li>
  )
}

export function Gallery({ all, moment }: { all: Everything; moment: Moment }) {
  const [still, setStill] = useState(matchMedia('(prefers-reduced-motion: reduce)').matches)
  const [chosen, setChosen] = useState<number | null>(null)
  const [playing, setPlaying] = useState(false)
  const stitches = moment.present ? all.pictures.stitches : all.pictures.stitches.filter((each) => each.event <= moment.event)
  const place = Math.min(chosen ?? stitches.length - 1, stitches.length - 1)
  const stitch = stitches[place] ?? null
  useEffect(() => setChosen(null), [moment.present, moment.stitch?.mixture])
  useEffect(() => {
    if (!playing) return
    const timer = setInterval(() => setChosen((now) => ((now ?? -1) + 1) % Math.max(1, stitches.length)), STEP)
    return () => clearInterval(timer)
  }, [playing, stitches.length])
  const none = !moment.present && stitches.length === 0
  const pictures = usePictures(all, chosen === null && moment.present ? null : (stitch?.mixture ?? null))
  const clips = none ? [] : (pictures?.clips ?? [])
  return (
    <section aria-labelledby="gallery">
      <div class="heading">
        <h2 id="gallery">What the mixture makes</h2>
        <label class="soft"><input type="checkbox" checked={!still} onChange={() => setStill(!still)} /> play clips</label>
      </div>
      {stitches.length > 1 && stitch && (
        <div class="stitches">
          <button aria-pressed={playing} onClick={() => setPlaying(!playing)}>{playing ? 'stop' : 'play the training'}</button>
          <label>Mixture {place + 1} of {stitches.length} <span class="soft">· stitched {ago(stitch.time, moment.now)}, at event {stitch.event}, from {epochs(stitch.epochs)}</span>
            <input class="stitch" type="range" min={0} max={stitches.length - 1} value={place} onInput={(event) => { setPlaying(false); setChosen(Number(event.currentTarget.value)) }} />
          </label>
        </div>
      )}
      {clips.length === 0 ? <p class="soft">{!pictures ? 'Reading the clips…' : moment.stitch ? 'No clips: this coordinator samples none, or has not yet.' : 'No clips yet: they are sampled after the first mixture is stitched.'}</p> : (
        <>
          <ul class="gallery">{clips.map((clip) => <Card key={clip.file} clip={clip} still={still} of={all.run.experts} />)}</ul>
          {clips.some((clip) => clip.experts.length > 0) && <p class="soft">Under each pair: which expert drew which step of the sampling, from noise (left) to clip (right).</p>}
        </>
      )}
    </section>
  )
}

function epochs(given: number[]): string {
  const low = Math.min(...given)
  const high = Math.max(...given)
  return low === high ? `epoch ${low} of every expert` : `epochs ${low} to ${high}`
}

import { useState } from 'preact/hooks'
import type { Clip, Run } from './api'

export function Gallery({ clips, run }: { clips: Clip[]; run: Run }) {
  const [still, setStill] = useState(matchMedia('(prefers-reduced-motion: reduce)').matches)
  return (
    <section aria-labelledby="gallery">
      <h2 id="gallery">What the mixture makes</h2>
      {clips.length === 0 ? <p class="soft">No clips yet: they are sampled after the first mixture is stitched.</p> : (
        <>
          <label class="soft"><input type="checkbox" checked={!still} onChange={() => setStill(!still)} /> play clips</label>
          <ul class="gallery">
            {clips.map((clip) => (
              <li key={clip.file}>
                <figure>
                  {still ? <div class="still">paused</div> : <img src={`${clip.url.replace(/^\//, '')}?of=${run.events}`} alt={`Clip made from the prompt: ${clip.prompt}`} loading="lazy" />}
                  <figcaption dir="auto">{clip.prompt}</figcaption>
                </figure>
              </li>
            ))}
          </ul>
        </>
      )}
    </section>
  )
}

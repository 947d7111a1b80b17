import { useState } from 'preact/hooks'
import type { EventLine } from './api'
import { ago } from './format'

export function Events({ events, until, now }: { events: EventLine[]; until: number; now: number }) {
  const [kind, setKind] = useState('')
  const [words, setWords] = useState('')
  const kinds = [...new Set(events.map((line) => line.kind))].sort()
  const shown = events.filter((line) => line.event <= until && (!kind || line.kind === kind) && (!words || line.text.toLowerCase().includes(words.toLowerCase()))).reverse()
  return (
    <section aria-labelledby="events">
      <h2 id="events">Events</h2>
      <div class="filter">
        <label>kind <select value={kind} onChange={(event) => setKind(event.currentTarget.value)}><option value="">all</option>{kinds.map((each) => <option key={each} value={each}>{each}</option>)}</select></label>
        <label>words <input value={words} onInput={(event) => setWords(event.currentTarget.value)} /></label>
        <span class="soft" role="status">{shown.length} of {events.length}</span>
      </div>
      <ol class="events scroll" tabIndex={0} aria-label="Events, newest first">
        {shown.slice(0, 200).map((line) => <li key={line.event}><span class="n soft">{line.event}</span> <span class="soft">{ago(line.time, now)}</span> <span dir="auto">{line.text}</span></li>)}
      </ol>
    </section>
  )
}

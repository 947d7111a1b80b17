import { useEffect, useState } from 'preact/hooks'
import { EVENTS_OF_PAGE, readEvents, type EventLine } from './api'
import { ago } from './format'
import type { Moment } from './past'

const LINES = 300

/** The events up to the moment: the page of the last one and those before it, as many as asked for. */
function useEvents(until: number, many: number): EventLine[] {
  const [lines, setLines] = useState<EventLine[]>([])
  useEffect(() => {
    let wanted = true
    const newest = Math.floor(Math.max(0, until - 1) / EVENTS_OF_PAGE)
    const numbers = Array.from({ length: Math.min(many, newest + 1) }, (_, i) => newest - i).reverse()
    Promise.all(numbers.map((number) => readEvents(number).catch(() => []))).then((found) => wanted && setLines(found.flat()))
    return () => { wanted = false }
  }, [until, many])
  return lines
}

export function Events({ moment }: { moment: Moment }) {
  const [kind, setKind] = useState('')
  const [words, setWords] = useState('')
  const [many, setMany] = useState(2)
  const events = useEvents(moment.event, many).filter((line) => line.event <= moment.event)
  const kinds = [...new Set(events.map((line) => line.kind))].sort()
  const found = events.filter((line) => (!kind || line.kind === kind) && (!words || line.text.toLowerCase().includes(words.toLowerCase()))).reverse()
  const first = events[0]?.event ?? 1
  return (
    <section aria-labelledby="events">
      <h2 id="events">Events</h2>
      <div class="filter">
        <label>kind <select value={kind} onChange={(event) => setKind(event.currentTarget.value)}><option value="">all</option>{kinds.map((each) => <option key={each} value={each}>{each}</option>)}</select></label>
        <label>words <input value={words} onInput={(event) => setWords(event.currentTarget.value)} /></label>
        <span class="soft" role="status">{found.length} of the {events.length} from event {first} on</span>
        {first > 1 && <button onClick={() => setMany(many + 4)}>read older events</button>}
      </div>
      <ol class="events scroll" tabIndex={0} aria-label="Events, newest first">
        {found.slice(0, LINES).map((line) => <li key={line.event}><span class="n soft">{line.event}</span> <span class="soft">{ago(line.time, moment.now)}</span> <span dir="auto">{line.text}</span></li>)}
      </ol>
      {found.length > LINES && <p class="soft">{found.length - LINES} more are not shown; filter by kind or words.</p>}
    </section>
  )
}

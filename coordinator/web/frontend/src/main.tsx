/** The page of a run: read once, then again after every event of the ledger, without losing place or focus. */

import { render } from 'preact'
import { useEffect, useMemo, useState } from 'preact/hooks'
import 'uplot/dist/uPlot.min.css'
import './style.css'
import { follow, readAll, type Everything } from './api'
import { Coverage } from './coverage'
import { Curves } from './curves'
import { Events } from './events'
import { Gallery } from './gallery'
import { Header, Join } from './header'
import { Health } from './health'
import { at } from './past'
import { People } from './people'

const REFRESH_SECONDS = 10
/** Without an event the live numbers are read again so often. */
const SETTLE_SECONDS = 1
/** Events that come close together are read at once. */

function App() {
  const [all, setAll] = useState<Everything | null>(null)
  const [problem, setProblem] = useState('')
  const [link, setLink] = useState(true)
  const [until, setUntil] = useState<number | null>(null)
  useEffect(() => {
    let ended = false
    let timer: ReturnType<typeof setTimeout> | undefined
    const plan = (seconds: number) => { clearTimeout(timer); timer = setTimeout(read, 1000 * seconds) }
    const read = async () => {
      try {
        const found = await readAll()
        if (!ended) { setAll(found); setProblem(''); setLink(true) }
      } catch (error) {
        if (!ended) { setProblem((error as Error).message); setLink(false) }
      }
      if (!ended) plan(REFRESH_SECONDS)
    }
    void read()
    const end = follow(() => plan(SETTLE_SECONDS), setLink)
    return () => { ended = true; clearTimeout(timer); end() }
  }, [])
  useEffect(() => { if (all) document.title = `${all.run.name} · Lutetia` }, [all?.run.name])
  const moment = useMemo(() => (all ? at(all, until ?? all.run.events) : null), [all, until])
  if (!all || !moment) return problem ? <p class="bad" role="alert">The run cannot be read: {problem}. Trying again.</p> : <p class="soft">Reading the run…</p>
  return (
    <main>
      <Header run={all.run} moment={moment} live={until === null} link={link} />
      <nav aria-label="Parts of this page">{['join', 'health', 'gallery', 'coverage', 'curves', 'people', 'events'].map((part) => <a key={part} href={`#${part}`} onClick={(event) => { event.preventDefault(); document.getElementById(part)?.scrollIntoView() }}>{part}</a>)}</nav>
      <Health all={all} />
      <Gallery clips={all.clips} run={all.run} />
      <div class="machine">
        <label>Time machine: everything below as of event <output>{moment.event}</output>
          <input type="range" min={1} max={all.run.events} value={moment.event} onInput={(event) => { const value = Number(event.currentTarget.value); setUntil(value >= all.run.events ? null : value) }} />
        </label>
        <button disabled={until === null} onClick={() => setUntil(null)}>now</button>
      </div>
      <Coverage moment={moment} since={all.run.created} />
      <Curves shards={moment.shards} series={all.series} until={moment.event} />
      <People peers={all.peers} total={all.peersTotal} now={all.run.time} events={all.run.events} />
      <Events events={all.events} until={moment.event} now={all.run.time} />
      <Join run={all.run} />
      <footer class="soft">Run <code>{all.run.run}</code>, manifest version {all.run.manifest_version}, coordinator {all.run.software}. <a href="api/v1/openapi.json">API</a> · <a href="status.json">JSON</a> · <a href="plain">without scripts</a> · <a href="metrics">metrics</a></footer>
    </main>
  )
}

render(<App />, document.getElementById('app')!)

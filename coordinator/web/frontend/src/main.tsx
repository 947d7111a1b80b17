/** The page of a run: read once, then again after every event of the ledger, without losing place or focus. */

import { render } from 'preact'
import { useEffect, useMemo, useState } from 'preact/hooks'
import 'uplot/dist/uPlot.min.css'
import './style.css'
import { exported, follow, readAll, type Everything } from './api'
import { Coverage } from './coverage'
import { Curves } from './curves'
import { Events } from './events'
import { Gallery } from './gallery'
import { moment as when } from './format'
import { Header, Join } from './header'
import { Health, problems } from './health'
import { NodePage } from './node'
import { at } from './past'
import { People } from './people'

const REFRESH_SECONDS = 10
/** Without an event the live numbers are read again so often. */
const SETTLE_SECONDS = 1
/** Events that come close together are read at once. */
const SPREAD_SECONDS = 4
/** Open pages read at different moments after an event, so that the coordinator answers them one after the other. */
const PARTS = ['join', 'gallery', 'health', 'coverage', 'curves', 'people', 'events']

function App() {
  const [all, setAll] = useState<Everything | null>(null)
  const [problem, setProblem] = useState('')
  const [link, setLink] = useState(true)
  const [until, setUntil] = useState<number | null>(null)
  useEffect(() => {
    let ended = false
    let timer: ReturnType<typeof setTimeout> | undefined
    let due = 0
    const plan = (seconds: number) => {
      const at = Date.now() + 1000 * seconds
      if (timer !== undefined && at >= due) return // it is read sooner already
      clearTimeout(timer)
      due = at
      timer = setTimeout(read, 1000 * seconds)
    }
    const read = async () => {
      timer = undefined
      try {
        const found = await readAll()
        if (!ended) { setAll(found); setProblem(''); setLink(true) }
      } catch (error) {
        if (!ended) { setProblem((error as Error).message); setLink(false) }
      }
      if (!ended && !exported) plan(REFRESH_SECONDS)
    }
    void read()
    const end = follow(() => plan(SETTLE_SECONDS + SPREAD_SECONDS * Math.random()), setLink)
    return () => { ended = true; clearTimeout(timer); end() }
  }, [])
  useEffect(() => { if (all) document.title = `${all.run.name} · Lutetia` }, [all?.run.name])
  const moment = useMemo(() => (all ? at(all, until ?? all.run.events) : null), [all, until])
  if (!all || !moment) return problem ? <p class="bad" role="alert">The run cannot be read: {problem}. Trying again.</p> : <p class="soft">Reading the run…</p>
  const red = problems(all, moment).filter((line) => line.level === 'red').length
  return (
    <main>
      <Header run={all.run} moment={moment} link={link} />
      <nav aria-label="Parts of this page">{PARTS.map((part) => <a key={part} class={part === 'join' ? 'main' : part === 'health' && red ? 'bad' : ''} href={`#${part}`} onClick={(event) => { event.preventDefault(); document.getElementById(part)?.scrollIntoView() }}>{part === 'health' && red ? `health: ${red} red` : part}</a>)}</nav>
      <div class="machine">
        <label>Time machine: everything as of event <strong>{moment.event}</strong> of {all.run.events} <span class="soft">· {when(moment.time)}</span>
          <input type="range" min={1} max={all.run.events} value={moment.event} aria-valuetext={`event ${moment.event}, ${when(moment.time)}`} onInput={(event) => { const value = Number(event.currentTarget.value); setUntil(value >= all.run.events ? null : value) }} />
        </label>
        <button disabled={until === null} onClick={() => setUntil(null)}>now</button>
      </div>
      <Gallery all={all} moment={moment} />
      <Health all={all} moment={moment} />
      <Coverage moment={moment} since={all.run.created} />
      <Curves shards={moment.shards} series={all.series} until={moment.event} hours={moment.hours} />
      <People moment={moment} events={all.run.events} />
      <Events moment={moment} />
      <Join run={all.run} />
      <footer class="soft">Run <code>{all.run.run}</code>, manifest version {all.run.manifest_version}, coordinator {all.run.software}.{!exported && <> <a href="api/v1/openapi.json">API</a> · <a href="status.json">JSON</a> · <a href="plain">without scripts</a> · <a href="metrics">metrics</a></>}</footer>
    </main>
  )
}

render(document.documentElement.dataset.view === 'node' ? <NodePage /> : <App />, document.getElementById('app')!)

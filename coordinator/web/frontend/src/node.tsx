/** The page of one node on its own machine: what it trains, how fast, and what became of its work. */

import { useEffect, useState } from 'preact/hooks'
import uPlot from 'uplot'
import { get } from './api'
import { Plot, axes } from './curves'
import { ago, bytes, count, expert, rate, span } from './format'

interface Device {
  lane?: number | null; state: string; reason: string; since: number; device: string | null; shard: number | null; shard_name: string | null; step: number | null
  steps: number | null; loss: number | null; samples_per_second: number | null; problem: string | null
  celsius?: number | null; slowed?: string | null
}
interface Status {
  devices?: Device[]; lane?: number | null
  state: string; reason: string; since: number; owner: string; peer_id: string; run: string | null; name: string | null
  shard: number | null; shard_name: string | null; epoch: number | null; epochs: number | null; step: number | null; steps: number | null
  samples: number | null; loss: number | null; samples_per_second: number | null; pending: number; accepted: number; accepted_today: number
  refused: number; last_accepted: number | null; due: number | null; paused_until: number | null; device: string | null
  precision: string | null; online: boolean; problem: string | null; slowed: string | null; blobs_bytes: number | null; copies: number
  software: string; started: number; traffic?: Traffic | null
}
interface Traffic {
  sent_today: number; received_today: number; this_month: number; bytes_per_day: number | null; bytes_per_month: number | null
  held_back: string | null; expected: string | null
}
interface Verdict { time: number; shard: number; lane?: number; epoch: number; outcome: 'accepted' | 'refused'; text: string }
interface Loss { time: number; shard: number; samples: number; loss: number }
interface Document { time: number; status: Status; journal: { verdicts: Verdict[]; losses: Loss[]; log: string[] } | null }

const REFRESH_SECONDS = 2

export function NodePage() {
  const [found, setFound] = useState<Document | null>(null)
  const [problem, setProblem] = useState('')
  useEffect(() => {
    let ended = false
    let timer: ReturnType<typeof setTimeout> | undefined
    const read = async () => {
      try {
        const document = await get<Document>('node')
        if (!ended) { setFound(document); setProblem('') }
      } catch (error) {
        if (!ended) setProblem((error as Error).message)
      }
      if (!ended) timer = setTimeout(read, 1000 * REFRESH_SECONDS)
    }
    void read()
    return () => { ended = true; clearTimeout(timer) }
  }, [])
  useEffect(() => { if (found) document.title = `${found.status.state} · Lutetia node` }, [found?.status.state])
  if (!found) return problem ? <p class="bad" role="alert">The node cannot be read: {problem}. Trying again.</p> : <p class="soft">Reading the node…</p>
  const { status, journal, time } = found
  return (
    <main>
      <Top status={status} now={time} problem={problem} />
      {(status.problem || status.slowed || status.traffic?.held_back) && (
        <section aria-labelledby="health"><h2 id="health">Health</h2>
          <ul class="health">
            {status.problem && <li class="red"><strong>Red: last problem</strong><br /><span dir="auto">{status.problem}</span></li>}
            {status.slowed && <li class="amber"><strong>Note: slowed down</strong><br /><span dir="auto">{status.slowed}</span></li>}
            {status.traffic?.held_back && <li class="amber"><strong>Note: the cap on bytes</strong><br /><span dir="auto">{status.traffic.held_back}</span></li>}
          </ul>
        </section>
      )}
      {(status.devices?.length ?? 0) > 1 && <Devices devices={status.devices!} />}
      {journal ? <Journal losses={journal.losses} verdicts={journal.verdicts} log={journal.log} now={time} /> : <p class="soft">The daemon is of an earlier version, which keeps no verdicts, losses or log for this page.</p>}
      <footer class="soft">Lutetia {status.software}, started {ago(status.started, time)}. <code>lutetia pause --for 2h</code>, <code>lutetia resume</code> and <code>lutetia finish</code> control the node.</footer>
    </main>
  )
}

/** Null and undefined: the run has no lanes. */
function inLane(lane: number | null | undefined): string {
  return lane == null ? '' : `, lane ${lane}`
}

/** One row per device, where there are several. */
function Devices({ devices }: { devices: Device[] }) {
  return (
    <section aria-labelledby="devices">
      <h2 id="devices">Devices</h2>
      <div class="scroll" tabIndex={0}>
        <table>
          <thead><tr><th scope="col">device</th><th scope="col">state</th><th scope="col">expert</th><th scope="col">step</th><th scope="col">loss</th><th scope="col">samples/s</th><th scope="col">°C</th><th scope="col">why</th></tr></thead>
          <tbody>
            {devices.map((each, i) => (
              <tr key={i}>
                <th scope="row">{each.device ?? '–'}</th><td>{each.state}</td><td>{each.shard === null ? '–' : `${expert(each.shard)} ${each.shard_name ?? ''}${inLane(each.lane)}`}</td>
                <td class="n">{each.step ?? '–'}/{each.steps ?? '–'}</td><td class="n">{each.loss === null ? '–' : each.loss.toFixed(4)}</td>
                <td class="n">{each.samples_per_second === null ? '–' : rate(each.samples_per_second)}</td><td class="n">{each.celsius == null ? '–' : each.celsius.toFixed(0)}</td><td dir="auto">{each.problem ?? each.slowed ?? each.reason}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  )
}

function Top({ status, now, problem }: { status: Status; now: number; problem: string }) {
  const share = status.step !== null && status.steps ? Math.min(1, status.step / status.steps) : 0
  const facts: [string, string][] = [
    ['samples per second', status.samples_per_second === null ? '–' : rate(status.samples_per_second)],
    ['training loss', status.loss === null ? '–' : status.loss.toFixed(4)],
    ['accepted', count(status.accepted)], ['of them today', count(status.accepted_today)], ['refused', count(status.refused)],
    ['waiting for a verdict', count(status.pending)],
    ['last accepted', ago(status.last_accepted, now)],
    ['next checkpoint', status.due === null ? '–' : status.due > now ? `in ${span(status.due - now)}` : 'now'],
    ['served to peers', status.blobs_bytes === null ? '–' : bytes(status.blobs_bytes)], ["copies of others' work", count(status.copies)],
    ...(status.traffic ? traffic(status.traffic) : []),
  ]
  const good = ['training', 'publishing', 'standby'].includes(status.state)
  return (
    <header>
      <div class="title">
        <h1 dir="auto">{status.name ?? 'This node'}</h1>
        <span class={`state ${good ? 'training' : 'paused'}`} role="status">{status.state}</span>
        <span class={problem ? 'link bad' : 'link soft'} role="status">{problem ? `${problem}; trying again` : status.online ? 'online' : 'offline'}</span>
      </div>
      <p class="about"><span dir="auto">{status.reason}</span> <span class="soft">for {span(Math.max(0, now - status.since))}</span>{status.paused_until !== null && ` until ${new Date(1000 * status.paused_until).toLocaleString()}`}</p>
      {status.shard !== null && (
        <>
          <div class="progress" role="progressbar" aria-label="Steps of this epoch" aria-valuemin={0} aria-valuemax={100} aria-valuenow={Math.round(100 * share)}><div style={{ width: `${100 * share}%` }} /></div>
          <p class="eta">Expert <strong>{expert(status.shard)} {status.shard_name}</strong>{inLane(status.lane)} · newest accepted epoch {status.epoch ?? '–'} of {status.epochs ?? '–'} · step {count(status.step ?? 0)} of {status.steps === null ? '–' : count(status.steps)} · {count(status.samples ?? 0)} samples</p>
        </>
      )}
      <dl class="facts">{facts.map(([name, value]) => <div key={name}><dt>{name}</dt><dd>{value}</dd></div>)}</dl>
      <p class="soft">{status.device ?? 'device not probed yet'}{status.precision && ` · ${status.precision}`} · peer id <code>{status.peer_id}</code>: on the run's page, <em>find me</em> shows what counted.</p>
    </header>
  )
}

/** Bytes of today and of the month, each beside its cap. */
function traffic(traffic: Traffic): [string, string][] {
  const beside = (used: number, cap: number | null) => bytes(used) + (cap === null ? '' : ` of ${bytes(cap)}`)
  const facts: [string, string][] = [
    ['sent today', bytes(traffic.sent_today)], ['received today', bytes(traffic.received_today)],
  ]
  if (traffic.bytes_per_day !== null) facts.push(['both today', beside(traffic.sent_today + traffic.received_today, traffic.bytes_per_day)])
  if (traffic.bytes_per_month !== null) facts.push(['both this month', beside(traffic.this_month, traffic.bytes_per_month)])
  return facts
}

function Journal({ losses, verdicts, log, now }: { losses: Loss[]; verdicts: Verdict[]; log: string[]; now: number }) {
  return (
    <>
      <section aria-labelledby="loss"><h2 id="loss">Training loss</h2><LossCurve losses={losses} /></section>
      <section aria-labelledby="verdicts">
        <h2 id="verdicts">What became of its work</h2>
        {verdicts.length === 0 ? <p class="soft">No verdict yet: the first comes after the first whole epoch.</p> : (
          <ul class="events scroll" tabIndex={0} aria-label="Verdicts, newest first">
            {[...verdicts].reverse().map((each, i) => <li key={i}><span class="soft">{ago(each.time, now)}</span> <span class={each.outcome === 'accepted' ? 'good' : 'bad'}>{each.outcome}</span>: expert {expert(each.shard)}{inLane(each.lane || null)} epoch {each.epoch} <span dir="auto">{each.text}</span></li>)}
          </ul>
        )}
      </section>
      <section aria-labelledby="log"><h2 id="log">Log</h2><pre class="log scroll" tabIndex={0} aria-label="The last lines of the log, newest last">{log.join('\n')}</pre></section>
    </>
  )
}

/** Against samples, one line per expert that this node has trained since its start. */
function LossCurve({ losses }: { losses: Loss[] }) {
  if (losses.length < 2) return <p class="soft">A curve needs two steps.</p>
  const shards = [...new Set(losses.map((each) => each.shard))]
  const samples = [...new Set(losses.map((each) => each.samples))].sort((a, b) => a - b)
  const lines = shards.map((shard) => {
    const known = new Map(losses.filter((each) => each.shard === shard).map((each) => [each.samples, each.loss]))
    return samples.map((at) => known.get(at) ?? null)
  })
  const series: uPlot.Series[] = [{ label: 'samples' }, ...shards.map((shard, i) => ({ label: `expert ${expert(shard)}`, stroke: i === shards.length - 1 ? '#2f7fc4' : '#8a93a0', width: 2, spanGaps: true, points: { show: false } }))]
  return <Plot data={[samples, ...lines]} options={{ series, axes: axes('samples of the expert', 'training loss'), scales: { x: { time: false } } }} label={`Training loss against samples, ${losses.length} points`} />
}

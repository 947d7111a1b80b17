import { useState } from 'preact/hooks'
import { encode } from 'uqr'
import type { Run } from './api'
import { bytes, count, rate, span } from './format'
import type { Moment } from './past'

const WORDS = { training: 'training', stalled: 'something stands still', stitching: 'stitching the final mixture', finished: 'finished' }

export function Header({ run, moment, live, link }: { run: Run; moment: Moment; live: boolean; link: boolean }) {
  const share = Math.min(1, moment.samples / run.samples_budget)
  const facts: [string, string][] = [
    ['experts', String(run.experts)],
    ['accepted samples per second, last hour', rate(run.samples_per_second)],
    ['working', String(run.peers_working)],
    ['online', String(run.peers_online)],
    ['in 24 hours', String(run.peers_day)],
    ['results accepted', count(moment.accepted)],
    ['invalid', count(run.rejected)],
  ]
  return (
    <header>
      <div class="title">
        <h1>{run.name}</h1>
        <span class={`state ${run.state}`} role="status">{WORDS[run.state]}</span>
        <span class={link ? 'link soft' : 'link bad'} role="status">{live ? (link ? 'live' : 'no connection; trying again') : `as of event ${moment.event}`}</span>
      </div>
      <div class="progress" role="progressbar" aria-label="Samples of the budget" aria-valuemin={0} aria-valuemax={100} aria-valuenow={Math.round(100 * share)}>
        <div style={{ width: `${100 * share}%` }} />
      </div>
      <p>
        <strong>{(100 * share).toFixed(share < 0.1 ? 1 : 0)} %</strong> of {count(run.samples_budget)} samples
        {run.state !== 'finished' && (
          <> · {run.arrival.seconds === null ? 'no arrival time' : <>about <strong>{span(run.arrival.seconds)}</strong> left</>} <span class="soft">({run.arrival.basis})</span></>
        )}
      </p>
      <dl class="facts">{facts.map(([name, value]) => <div key={name}><dt>{name}</dt><dd>{value}</dd></div>)}</dl>
    </header>
  )
}

export function Join({ run }: { run: Run }) {
  const [copied, setCopied] = useState(false)
  if (!run.join) return <section aria-labelledby="join"><h2 id="join">Join</h2><p>The coordinator has lost the run's ticket; ask the owner for it.</p></section>
  const needs = run.memory_bytes || run.disk_bytes
  return (
    <section aria-labelledby="join" class="join">
      <h2 id="join">Join</h2>
      <div>
        <p>One command on a machine with a GPU or a processor to spare:</p>
        <pre tabIndex={0}><code>{run.join}</code></pre>
        <button onClick={() => navigator.clipboard.writeText(run.join).then(() => setCopied(true))}>{copied ? 'copied' : 'copy the command'}</button>
        <p class="soft">
          {needs ? `The device needs ${bytes(run.memory_bytes)} of memory, and ${bytes(run.disk_bytes)} of disk must be free.` : 'The owner asks for no particular device.'}
          {' '}<code>lutetia doctor TICKET</code> says whether a machine fits.
        </p>
      </div>
      <QrCode text={run.ticket} />
    </section>
  )
}

function QrCode({ text }: { text: string }) {
  const { data, size } = encode(text, { ecc: 'L', border: 2 })
  const path = data.flatMap((row, y) => row.map((dark, x) => (dark ? `M${x} ${y}h1v1h-1z` : ''))).join('')
  return <svg class="qr" viewBox={`0 0 ${size} ${size}`} role="img" aria-label="The ticket as a QR code"><rect width={size} height={size} fill="#fff" /><path d={path} fill="#000" /></svg>
}

import { useState } from 'preact/hooks'
import { encode } from 'uqr'
import { exported, type Run } from './api'
import { ago, bytes, count, moment as when, rate, span } from './format'
import type { Moment } from './past'

const WORDS = { training: 'training', stalled: 'something stands still', stitching: 'stitching the final mixture', finished: 'finished', paused: 'paused' }
const GIB = 2 ** 30
const USABLE = 0.96
/** Of a card's nominal memory; the driver keeps the rest. */
const CARDS: [number, string][] = [
  [4, 'GTX 1650'], [6, 'RTX 2060'], [8, 'RTX 4060, RTX 3060 Ti'], [12, 'RTX 3060, RTX 4070'], [16, 'T4, RTX 4060 Ti 16 GB, RX 7800 XT'],
  [24, 'RTX 3090, RTX 4090'], [32, 'RTX 5090'], [48, 'L40S, RTX 6000 Ada'], [80, 'A100, H100'], [141, 'H200'],
]

export function Header({ run, moment, link }: { run: Run; moment: Moment; link: boolean }) {
  const share = Math.min(1, moment.samples / run.samples_budget)
  const facts: [string, string][] = [
    ['samples per second, last hour', rate(moment.present ? run.samples_per_second : moment.rate)],
    ...(moment.present ? [['peers working', count(run.peers_working)], ['peers online', count(run.peers_online)]] as [string, string][] : []),
    ['peers in 24 hours', count(moment.present ? run.peers_day : moment.peersDay)],
    ['results accepted', count(moment.accepted)],
    [moment.present ? 'results invalid' : 'rolled back', count(moment.present ? run.rejected : moment.void)],
    ['weights accepted', bytes(moment.bytes)],
    ...(moment.flops !== null ? [['FLOPs of accepted samples', count(moment.flops)]] as [string, string][] : []),
    ['experts', String(run.experts)],
  ]
  return (
    <header>
      <div class="title">
        <h1 dir="auto">{run.name}</h1>
        <span class={`state ${run.state}`} role="status">{WORDS[run.state]}</span>
        <span class={link ? 'link soft' : 'link bad'} role="status">{!moment.present ? `as of event ${moment.event}` : exported ? `exported ${when(run.time)}` : link ? 'live' : 'no connection; trying again'}</span>
      </div>
      {run.about && <p class="about" dir="auto">{run.about}</p>}
      <div class="progress" role="progressbar" aria-label="Samples of the budget" aria-valuemin={0} aria-valuemax={100} aria-valuenow={Math.round(100 * share)}>
        <div style={{ width: `${100 * share}%` }} />
      </div>
      <p class="eta">
        <strong>{(100 * share).toFixed(share < 0.1 ? 1 : 0)} %</strong> of {count(run.samples_budget)} samples
        {moment.present && run.state !== 'finished' && (
          <> · {run.arrival.seconds === null ? 'no arrival time' : <>about <strong>{span(run.arrival.seconds)}</strong> left</>} <span class="soft">({run.arrival.basis})</span></>
        )}
      </p>
      <dl class="facts">{facts.map(([name, value]) => <div key={name}><dt>{name}</dt><dd>{value}</dd></div>)}</dl>
    </header>
  )
}

/** Which cards have the memory that the owner asks for. */
export function cards(memory: number): string {
  if (!memory) return 'The owner asks for no particular device: a processor can join, too.'
  const place = CARDS.findIndex(([size]) => size * GIB * USABLE >= memory)
  if (place < 0) return `The device needs ${bytes(memory)} of memory, more than one card has.`
  const [size, names] = CARDS[place]!
  return `The device needs ${bytes(memory)} of memory: ${names} (${size} GB)${place + 1 < CARDS.length ? ', and larger cards' : ''}; or a machine with as much memory for its processor.`
}

export function Join({ run }: { run: Run }) {
  const [copied, setCopied] = useState(false)
  if (!run.join) return <section aria-labelledby="join"><h2 id="join">Join</h2><p>The coordinator has lost the run's ticket; ask the owner for it.</p></section>
  return (
    <section aria-labelledby="join" class="join">
      <h2 id="join">Join</h2>
      <div>
        <p>One command on a machine with a GPU or a processor to spare:</p>
        <pre tabIndex={0}><code>{run.join}</code></pre>
        <button class="main" onClick={() => navigator.clipboard.writeText(run.join).then(() => setCopied(true))}>{copied ? 'copied' : 'copy the command'}</button>
        <p class="soft">
          {cards(run.memory_bytes)}{run.disk_bytes > 0 && ` ${bytes(run.disk_bytes)} of disk must be free.`}
          {' '}<code>lutetia doctor TICKET</code> says whether a machine fits.
          {run.expires < run.time + 7 * 86400 && ` The manifest ${run.expires < run.time ? `expired ${ago(run.expires, run.time)}` : `expires in ${span(run.expires - run.time)}`}.`}
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

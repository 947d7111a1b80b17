import { useEffect, useState } from 'preact/hooks'
import { exported, linked, readShard, type Accepted, type Refused, type Shard } from './api'
import { ago, count, expert, hue, short, span } from './format'
import { Curve } from './curves'
import { Lanes, laneWords } from './lanes'
import { last, pace, type Moment } from './past'

const WIDTH = 1000
const ROW = 22
const SETTLE_MILLISECONDS = 150
/** While the time machine's slider moves, nothing is asked for. */
const MOST_BARS = 300
/** Of one expert; with more results, each bar stands for several. */

/** The results that end a bar: all of them, or every so many. */
function ends(points: Accepted[]): Accepted[] {
  const group = Math.ceil(points.length / MOST_BARS)
  return group <= 1 ? points : points.filter((_, i) => (points.length - 1 - i) % group === 0)
}

/** One row per expert over time: a bar per accepted result, red for refused ones, hatched where nothing came for long. */
export function Coverage({ moment, since }: { moment: Moment; since: number }) {
  const [open, setOpen] = useState<number | null>(null)
  const until = Math.max(moment.time, since + 1)
  const x = (time: number) => (WIDTH * (time - since)) / (until - since)
  return (
    <section aria-labelledby="coverage">
      <h2 id="coverage">Coverage</h2>
      <p class="soft">Each bar is an accepted result, from the one before it; a bar's shade changes with its author. Red marks are refused results. Grey hatching: nothing came for three times the usual pace.</p>
      <table class="coverage">
        <thead><tr><th scope="col">expert</th><th scope="col">epochs</th><th scope="col">held-out loss</th><th scope="col">last</th><th scope="col" class="wide">time</th></tr></thead>
        <tbody>
          {moment.shards.map((shard) => <Row key={shard.status.shard} shard={shard} x={x} until={until} now={moment.now} event={moment.event} present={moment.present} of={moment.shards.length} open={open === shard.status.shard} toggle={() => setOpen(open === shard.status.shard ? null : shard.status.shard)} />)}
        </tbody>
      </table>
    </section>
  )
}

function Row({ shard, x, until, now, event, present, of, open, toggle }: { shard: Shard; x: (t: number) => number; until: number; now: number; event: number; present: boolean; of: number; open: boolean; toggle: () => void }) {
  const { status, accepted, refused } = shard
  const newest = last(accepted)
  const authors = [...new Set(accepted.map((point) => point.author))]
  const usual = pace(accepted)
  const shown = ends(accepted)
  const group = Math.max(1, Math.ceil(accepted.length / MOST_BARS))
  const bars = shown.map((point, i) => {
    const from = i ? shown[i - 1]!.time : point.time
    const gap = usual !== null && point.time - from > 3 * usual * group
    return { point, from, gap }
  })
  const idle = usual !== null && newest && newest.epoch < status.epochs && until - newest.time > 3 * usual
  const words = `${accepted.filter((point) => !point.void).length} accepted by ${authors.length} peers, ${refused.length} refused`
  return (
    <>
      <tr>
        <th scope="row"><button class="row" aria-expanded={open} onClick={toggle}><span class="dot" style={{ background: hue(status.shard, of) }} />{expert(status.shard)} {status.name}</button>{present && status.merge && <span class="soft lanes">{laneWords(status)}</span>}</th>
        <td class="n">{newest?.epoch ?? 0}/{status.epochs}</td>
        <td class="n">{newest ? newest.loss.toFixed(4) : '–'}</td>
        <td class="n">{ago(newest?.time ?? null, now)}</td>
        <td class="wide">
          <svg viewBox={`0 0 ${WIDTH} ${ROW}`} preserveAspectRatio="none" role="img" aria-label={words}>
            {bars.map(({ point, from, gap }) => gap
              ? <g key={point.event}><rect class="gap" x={x(from)} width={Math.max(1, x(point.time) - x(from))} y={8} height={6} /><rect class={point.void ? 'void' : 'bar'} x={x(point.time) - 2} width={4} y={2} height={18} /></g>
              : <rect key={point.event} class={point.void ? 'void' : 'bar'} x={x(from)} width={Math.max(2, x(point.time) - x(from) - 1)} y={4} height={14} style={{ fill: hue(status.shard, of), opacity: point.void ? 0.25 : 1 - 0.35 * (authors.indexOf(point.author) % 3) / 2 }}><title>{`epoch ${point.epoch} by ${short(point.author)}, held-out loss ${point.loss.toFixed(4)}, after ${span(point.time - from)}${point.void ? ', rolled back' : ''}`}</title></rect>)}
            {idle && <rect class="gap" x={x(newest.time)} width={WIDTH - x(newest.time)} y={8} height={6} />}
            {refused.map((point) => <rect key={point.event} class="refused" x={x(point.time) - 2} width={4} y={0} height={ROW} />)}
          </svg>
        </td>
      </tr>
      {open && <tr><td colSpan={5}><Lineage shard={shard} now={now} until={event} of={of} present={present} /></td></tr>}
    </>
  )
}

/** What the columns do not tell of the expert's last results before an event: their digests, notes and reasons, by event. */
function useDetails(shard: Shard, until: number) {
  const [details, setDetails] = useState(new Map<number, Accepted | Refused>())
  const newest = Math.max(shard.accepted.at(-1)?.event ?? 0, shard.refused.at(-1)?.event ?? 0)
  useEffect(() => {
    let ended = false
    const timer = setTimeout(() => {
      readShard(shard.status.shard, until + 1).then((found) => {
        if (!ended) setDetails(new Map([...found.accepted, ...found.refused].map((point) => [point.event, point])))
      }, () => {}) // the page says itself when there is no connection, and the next event asks again
    }, SETTLE_MILLISECONDS)
    return () => { ended = true; clearTimeout(timer) }
  }, [shard.status.shard, newest])
  return {
    of: (point: Accepted): Accepted => ({ ...(details.get(point.event) as Accepted | undefined), ...point }),
    refused: (point: Refused): Refused => ({ ...(details.get(point.event) as Refused | undefined), ...point }),
  }
}

function Lineage({ shard, now, until, of, present }: { shard: Shard; now: number; until: number; of: number; present: boolean }) {
  const { status } = shard
  const { copies, audit, owner, state } = status
  const details = useDetails(shard, until)
  const points = [...shard.accepted].reverse().slice(0, 50).map(details.of)
  return (
    <div class="lineage">
      <p class="soft">{count(shard.clips)} training clips ({(100 * shard.prior).toFixed(0)} % of all), {shard.expert}. Before any training the held-out loss was {shard.initial_loss === null ? 'not measured yet' : shard.initial_loss.toFixed(4)}.</p>
      {present && (
        <p class="soft">
          {status.merge ? 'Several nodes train it, each a lane of its own.' : owner ? <>Held now by <a href={`#peer=${owner}`}><code>{short(owner)}</code></a> ({state}).</> : `Nobody holds it now (${state}).`}
          {' '}{copies === null ? 'How many peers hold its newest checkpoint is not known yet.' : `${copies} ${copies === 1 ? 'peer holds' : 'peers hold'} a copy of its newest checkpoint, beside the coordinator.`}
          {audit && ` Last audit: ${audit}.`}
        </p>
      )}
      {present && status.merge && <Lanes status={status} merge={status.merge} now={now} />}
      <Curve shards={[shard]} of={of} />
      {shard.sheet && <details open><summary>What it learns: training clips of its shard</summary><img class="sheet" src={linked(shard.sheet)} alt={`Contact sheet of training clips of expert ${expert(shard.status.shard)}`} loading="lazy" /></details>}
      <div class="scroll" tabIndex={0}>
        <table>
          <caption>Lineage, newest first{shard.accepted.length > 50 ? ' (the last 50)' : ''}</caption>
          <thead><tr><th scope="col">epoch</th><th scope="col">held-out loss</th><th scope="col">author</th><th scope="col">accepted</th><th scope="col">weights</th><th scope="col">note</th></tr></thead>
          <tbody>
            {points.map((point) => (
              <tr key={point.event} class={point.void ? 'void' : ''}>
                <td class="n">{point.epoch}</td><td class="n">{point.loss.toFixed(4)}</td><td><a href={`#peer=${point.author}`}><code>{short(point.author)}</code></a></td>
                <td class="n">{ago(point.time, now)}</td><td>{point.weights === undefined ? '…' : exported ? <code>{short(point.weights)}</code> : <a href={`blobs/${point.weights}`}><code>{short(point.weights)}</code></a>}</td><td>{point.void ? 'rolled back' : point.note}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {shard.refused.length > 0 && (
        <details><summary>{shard.refused.length} refused results</summary>
          <ul>{[...shard.refused].reverse().map(details.refused).map((point) => <li key={point.event}>epoch {point.epoch}{point.owner && <> of <code>{short(point.owner)}</code></>}, {point.verdict ?? 'refused'} at {point.check}: <span dir="auto">{point.text ?? '…'}</span></li>)}</ul>
        </details>
      )}
    </div>
  )
}

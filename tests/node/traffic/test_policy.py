"""What a cap on bytes allows: whole results, training before others, and a reason for every refusal."""

from __future__ import annotations

import datetime
import math

from lutetia.node.traffic.forecast import forecast_traffic
from lutetia.node.traffic.policy import (
    SETUP,
    ByteCaps,
    DeviceBytes,
    bytes_left,
    period_at,
    promised,
    spare_bytes,
    why_no_epoch,
)

GB = 10**9
NOON = datetime.datetime(2026, 11, 30, 12).timestamp()
TODAY = period_at(NOON)


def left(day: float | None, used: float, month: float | None = None, before: float = 0.0, records: float = 0.0):
    caps = ByteCaps(None if day is None else int(day * GB), None if month is None else int(month * GB))
    return bytes_left(caps, int(used * GB), int((used + before) * GB), TODAY, NOON, records)


def test_period_is_the_local_day_and_the_calendar_month():
    assert (TODAY.day, TODAY.month) == ("2026-11-30", "2026-11")
    assert TODAY.day_ends == TODAY.month_ends == datetime.datetime(2026, 12, 1).timestamp()
    assert period_at(datetime.datetime(2026, 12, 31, 23).timestamp()).month_ends == datetime.datetime(2027, 1, 1).timestamp()


def test_the_cap_that_leaves_least_holds():
    assert math.isinf(left(None, 5).bytes)
    assert (left(20, 5).bytes, left(20, 5).period) == (15 * GB, "day")
    assert left(20, 5, records=1e5).bytes == (15 - 4.32) * GB, "records of the rest of the day are kept"
    assert (left(20, 5, month=100, before=90).bytes, left(20, 5, month=100, before=90).period) == (5 * GB, "month")


def test_epoch_begins_only_where_its_upload_and_those_under_way_fit():
    device = DeviceBytes(result=4 * GB, begun=1)
    need = SETUP * 2 * 4
    assert promised([device]) == SETUP * 4 * GB
    assert why_no_epoch(left(20, 20 - need), [device]) is None
    why = why_no_epoch(left(20, 20 - need + 0.001), [device])
    assert why == "the cap of 20 GB a day leaves 8.8 GB besides records, and results under way and the next one take 8.8 GB"
    assert why_no_epoch(left(None, 1e6), [device]) is None


def test_every_device_has_room_for_its_own_result():
    device = DeviceBytes(result=4 * GB)
    assert why_no_epoch(left(20, 20 - 8 * SETUP), [device, device]) is None
    assert why_no_epoch(left(20, 20 - 7 * SETUP), [device, device])


def test_shard_is_taken_only_where_its_data_and_parent_fit_besides():
    assert why_no_epoch(left(20, 10), [DeviceBytes(result=4 * GB)]) is None
    assert why_no_epoch(left(20, 10), [DeviceBytes(result=4 * GB, data=6 * GB)])
    assert why_no_epoch(left(20, 12), [DeviceBytes(result=4 * GB, parent=4 * GB)])


def test_cap_below_one_result_says_so():
    why = why_no_epoch(left(2, 0), [DeviceBytes(result=4 * GB)])
    assert why
    assert why.endswith("more than the cap allows at all; raise bytes_per_day")


def test_others_get_what_training_cannot_use_up_by_midnight():
    slow, fast = (DeviceBytes(result=GB, begun=1, per_second=rate) for rate in (GB / 43_200, 20 * GB / 43_200))
    assert spare_bytes(left(20, 2), [slow], NOON) == (18 - 2 * SETUP) * GB
    assert spare_bytes(left(20, 2), [fast], NOON) == 0.0
    assert spare_bytes(left(20, 2), [fast], TODAY.day_ends - 60) > 15 * GB, "a minute takes little"
    assert math.isinf(spare_bytes(left(None, 2), [fast], NOON))


def test_forecast_counts_results_copies_data_and_audits():
    plain = forecast_traffic(result=GB, data=3 * GB, rate=2.0, samples=3600, heartbeat=20.0)
    assert plain.results == 2.0
    assert 2.0 * GB < plain.sent < 2.1 * GB
    assert plain.copied == 8 * GB
    assert plain.once == 4 * GB
    alone = forecast_traffic(result=GB, data=3 * GB, rate=2.0, samples=7200, heartbeat=20.0, copies=False, audits=False)
    assert (alone.results, alone.copied, alone.standby) == (1.0, 2 * GB, 0.0), "a longer interval sends less"
    assert "2 results an hour" in plain.lines()[0]

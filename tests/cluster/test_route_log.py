import msgspec
import pytest

from cluster.route_log import RouteLog
from kvcache.names import pack_tokens
from messages.errors import ErrorInfo
from messages.fleet import WorkerInfo
from messages.miss import MissedRun
from messages.request import Copy, GenerateRequest, HeldRun, SamplingParams
from messages.route import Placement
from messages.stream import GotRun, PromptPlan, PromptSources, TokenChunk

WORKER = WorkerInfo(
    worker_id="d",
    role="decode",
    address="tcp://d:1",
    node_id="n",
    fingerprint=b"f",
    block_size=10,
    num_blocks=100,
    block_bytes=1,
    max_model_len=1000,
    max_num_seqs=8,
    roads=(),
)
HELD = (HeldRun(0, 6, (Copy("tcp://d:1", "device"),)),)


def sequence(client_id, choice=0, tenant=0):
    return GenerateRequest(
        request_id=f"{client_id}-0123abcd-{choice}",
        token_ids=pack_tokens(range(100)),
        num_prompt_tokens=100,
        params=SamplingParams(max_tokens=4),
        tenant=tenant,
    )


def placement(placed_id, worker_id="d", **changes):
    fields = {
        "request_id": placed_id,
        "decode_worker": worker_id,
        "decode_address": "tcp://d:1",
        "decode_match_tokens": 60,
        "missing": (MissedRun(6, 10, "evicted"),),
        "predicted_ttft_s": 0.5,
        "reason": "because",
    }
    return Placement(**(fields | changes))


def first_chunk(sequence_id, num_device_tokens=60):
    got = (GotRun(0, num_device_tokens, "device"), GotRun(num_device_tokens, 100, "computed"))
    sources = PromptSources(device=num_device_tokens, computed=100 - num_device_tokens)
    return TokenChunk(request_id=sequence_id, token_ids=[1], sources=sources, plan=PromptPlan(got=got))


def log_of(max_kept=10):
    return RouteLog(max_kept, {"d": WORKER})


def answered(log, client_id, began_s=1.0, tenant=0, num_device_tokens=60):
    """A request that was placed by the router and has its first token."""
    asked = sequence(client_id, tenant=tenant)
    log.begin([asked], began_s, 10.0)
    log.take_placement(placement(asked.request_id))
    log.send("d", "tcp://d:1", sent(asked.request_id, tenant))
    log.take_chunk(first_chunk(asked.request_id, num_device_tokens), 10.25)
    log.end(asked.request_id)


def sent(placed_id, tenant=0, held=HELD):
    return GenerateRequest(
        request_id=placed_id,
        token_ids=b"",
        num_prompt_tokens=100,
        params=SamplingParams(max_tokens=4),
        tenant=tenant,
        held=held,
        predicted_ttft_s=0.5,
    )


def test_a_request_is_known_from_asked_to_answered():
    log = log_of()
    asked = sequence("mine")
    log.begin([asked, sequence("mine", 1)], 1.0, 10.0)
    record = log.find("mine", None)
    assert (record.placed_by, record.decode_worker, record.ttft_s, record.num_sequences) == ("", "", None, 2)
    log.take_placement(placement(asked.request_id))
    log.send("d", "tcp://d:1", sent(asked.request_id))
    assert (record.placed_by, record.reason, record.decode_worker) == ("router", "because", "d")
    log.take_chunk(first_chunk(asked.request_id), 10.25)
    assert record.ttft_s == pytest.approx(0.25)
    assert [(run.begin, run.end, run.why) for run in record.runs] == [
        (0, 60, None),
        (60, 90, "evicted"),
        (90, 100, "prompt_end"),
    ]
    log.end(asked.request_id)
    assert log.find("mine", None) is record


def test_misses_are_counted_by_reason_in_tokens():
    log = log_of()
    answered(log, "a")
    answered(log, "b")
    stats = log.stats()
    assert stats['kvray_prompt_misses_total{reason="evicted"}'] == 60
    assert stats.pop("kvray_explained_prompt_tokens_total") == 200
    assert sum(stats.values()) == 60


def test_what_was_said_to_be_held_and_was_not_is_told_in_blocks():
    log = log_of()
    answered(log, "a")
    assert log.predicted_blocks() == (6, 0)
    answered(log, "b", num_device_tokens=20)
    assert log.predicted_blocks() == (12, 4)


@pytest.mark.parametrize("asked_id", ["x-1", "cmpl-x-1", "chatcmpl-x-1", "resp_abc"])
def test_a_request_is_found_by_every_id_that_its_client_saw(asked_id):
    log = log_of()
    log.name_reply(sequence("x-1").request_id, "resp_abc")
    answered(log, "x-1")
    assert log.find(asked_id, None).request_id == "x-1"
    assert log.find(asked_id + "y", None) is None


def test_an_id_that_begins_like_a_replys_is_found_too():
    log = log_of()
    answered(log, "cmpl-1")
    assert log.find("cmpl-1", None).request_id == "cmpl-1"
    assert log.find("cmpl-cmpl-1", None).request_id == "cmpl-1"


def test_the_oldest_ones_make_room_and_those_under_way_do_not():
    log = log_of(max_kept=2)
    log.begin([sequence("open")], 0.0, 0.0)
    for number in range(4):
        answered(log, f"r{number}")
    assert [log.find(f"r{number}", None) is not None for number in range(4)] == [False, False, True, True]
    assert log.find("open", None) is not None
    log.end(sequence("open").request_id)
    assert len(log) == 2
    assert log.find("r2", None) is None


def test_where_none_are_kept_misses_are_counted_all_the_same():
    log = log_of(max_kept=0)
    answered(log, "a")
    assert len(log) == 0
    assert log.stats()['kvray_prompt_misses_total{reason="evicted"}'] == 30


def test_a_tenant_finds_its_own_alone():
    log = log_of()
    answered(log, "a", tenant=7)
    answered(log, "b", tenant=8)
    assert log.find("a", 7).request_id == "a"
    assert log.find("a", 8) is None
    assert [one.request_id for one in log.newest(10, 8)] == ["b"]
    assert len(log.newest(10, None)) == 2


def test_of_one_id_used_twice_the_last_request_is_found():
    log = log_of()
    answered(log, "same", began_s=1.0)
    log.begin([sequence("same", 0)], 2.0, 20.0)
    assert log.find("same", None).began_s == 2.0


def test_a_request_that_moves_is_told_by_the_placement_that_answered_it():
    log = log_of()
    asked = sequence("m")
    log.begin([asked], 1.0, 10.0)
    log.take_placement(placement(asked.request_id, worker_id="lost"))
    log.send("lost", "tcp://lost:1", sent(asked.request_id))
    log.take_placement(placement(f"{asked.request_id}#2", reason="again"))
    log.send("d", "tcp://d:1", sent(f"{asked.request_id}#2"))
    log.take_chunk(first_chunk(asked.request_id), 11.0)
    record = log.find("m", None)
    assert (record.num_placements, record.decode_worker, record.reason) == (2, "d", "again")
    assert record.placed_id == f"{asked.request_id}#2"


def test_a_placement_that_came_too_late_is_not_taken_for_the_one_by_hashing():
    log = log_of()
    asked = sequence("late")
    log.begin([asked], 1.0, 10.0)
    log.send("d", "tcp://d:1", sent(asked.request_id, held=None))
    log.take_placement(placement(asked.request_id, worker_id="other"))
    log.take_chunk(first_chunk(asked.request_id), 11.0)
    record = log.find("late", None)
    assert record.placed_by == "hashing"
    assert record.runs[1].why == "not_known"


def test_a_request_that_failed_before_a_token_says_how():
    log = log_of()
    asked = sequence("f")
    log.begin([asked], 1.0, 10.0)
    error = ErrorInfo(kind="CapacityError", message="all workers are busy", status=429)
    log.take_chunk(TokenChunk(request_id=asked.request_id, finish_reason="error", error=error), 10.1)
    log.end(asked.request_id)
    record = log.find("f", None)
    assert (record.error, record.ttft_s) == ("all workers are busy", None)


def test_a_client_that_left_before_a_token_is_told_as_gone():
    log = log_of()
    asked = sequence("mine")
    log.begin([asked], 1.0, 10.0)
    log.send("d", "tcp://d:1", sent(asked.request_id))
    log.end(asked.request_id)
    record = log.find("mine", None)
    assert record.has_left
    answered(log, "other")
    assert not log.find("other", None).has_left


def test_one_tenants_id_hides_no_others():
    log = log_of(max_kept=2)
    for tenant, digits in ((1, "aaaaaaaa"), (2, "bbbbbbbb")):
        asked = msgspec.structs.replace(sequence("same", tenant=tenant), request_id=f"same-{digits}-0")
        log.begin([asked], float(tenant), 10.0)
        log.end(asked.request_id)
    assert log.find("same", 1).began_s == 1.0
    assert log.find("same", 2).began_s == 2.0
    assert log.find("same", None).began_s == 2.0
    answered(log, "new", tenant=2)
    assert log.find("same", 1) is None
    assert log.find("same", None).tenant == 2


def test_an_error_in_what_only_explains_stops_no_token(caplog):
    log = log_of()
    asked = sequence("mine")
    log.begin([asked], 1.0, 10.0)
    log.send("d", "tcp://d:1", sent(asked.request_id))
    beyond = TokenChunk(request_id=asked.request_id, token_ids=[1], plan=PromptPlan(got=(GotRun(0, 999, "computed"),)))
    log.take_chunk(beyond, 10.25)
    assert "a request is not explained" in caplog.text

import numpy as np

from kvrouter.rendezvous import affinity, ranks, worker_hash
from tests.kvrouter.test_policy import request


def chosen(key, worker_ids):
    hashes = np.array([worker_hash(worker_id) for worker_id in worker_ids], np.uint64)
    return worker_ids[int(ranks(key, hashes).argmax())]


def test_who_leaves_moves_only_its_own_keys_and_all_have_about_as_many():
    workers = [f"w{number}" for number in range(8)]
    keys = [affinity(request(0, request_id=f"r{number}")) for number in range(500)]
    before = {key: chosen(key, workers) for key in keys}
    after = {key: chosen(key, workers[1:]) for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != "w0")
    shares = [sum(worker == chosen for chosen in before.values()) for worker in workers]
    assert min(shares) > 30


def test_prompts_that_begin_alike_have_one_affinity():
    assert affinity(request(160)) == affinity(request(1600))
    assert affinity(request(5, request_id="a")) != affinity(request(5, request_id="b"))

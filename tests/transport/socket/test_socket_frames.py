"""The pieces that the socket road is made of."""

from transport.socket.frames import ALIGNMENT, ANSWER, CHALLENGE_BYTES, REPLY, Vectors, merged


def test_neighbours_become_one_range():
    assert merged([(0, 10), (10, 5), (15, 0), (20, 1), (3, 4)]) == [(0, 15), (20, 1), (3, 4)]
    assert merged([]) == []


def test_what_comes_before_a_payload_keeps_it_aligned():
    assert (CHALLENGE_BYTES + ANSWER.size) % ALIGNMENT == 0
    assert REPLY.size % ALIGNMENT == 0


def test_vectors_go_on_where_a_call_stopped():
    views = [memoryview(bytes([i]) * 10) for i in range(5)]
    vectors = Vectors(list(views), 20)
    sent = b""
    for num_bytes in (3, 7, 20, 1, 9, 10):
        assert len(vectors.window()) <= 2
        sent += b"".join(vectors.window())[:num_bytes]
        vectors.advance(num_bytes)
    assert vectors.window() == []
    assert sent == b"".join(views)

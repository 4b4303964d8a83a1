import pytest
import zmq
from zmq.utils import z85

from messages.errors import ConfigError
from transport.secret import ClusterSecret


def test_text_form_gives_the_same_secret():
    secret = ClusterSecret.generate()
    assert ClusterSecret.from_hex(f" {secret.hex()}\n") == secret


@pytest.mark.parametrize("between", ["\n", ",", " , ", "\r\n"])
def test_two_secrets_are_one_with_another_one_that_is_known_too(between):
    both = ClusterSecret.from_hex("01" * 32 + between + "02" * 32 + "\n")
    assert both == ClusterSecret(b"\1" * 32, b"\2" * 32)
    assert ClusterSecret.from_hex(both.hex()) == both


def test_the_key_id_tells_secrets_apart_and_finds_those_that_are_known():
    one, other, stranger = (ClusterSecret(bytes([number]) * 32) for number in (1, 2, 3))
    both = ClusterSecret(one.key, other.key)
    assert both.key_id == one.key_id != other.key_id
    assert len(one.key_id) == 8
    assert (both.known_as(one.key_id), both.known_as(other.key_id)) == (one, other)
    assert both.known_as(stranger.key_id) is None
    assert one.known_as(other.key_id) is None


@pytest.mark.parametrize(
    "text", ["", "ab", "zz" * 32, "ab" * 33, "ab " * 32, "ab" * 32 + ",", ",".join(["ab" * 32] * 3)]
)
def test_text_that_is_no_secret_is_refused_and_not_repeated(text):
    with pytest.raises(ConfigError) as refusal:
        ClusterSecret.from_hex(text)
    assert text == "" or text not in str(refusal.value)


def test_keys_follow_from_the_secret_and_differ_by_side():
    one, other = ClusterSecret(b"\1" * 32), ClusterSecret(b"\2" * 32)
    assert one.server_keys() == ClusterSecret(b"\1" * 32).server_keys()
    assert len({one.server_keys(), one.client_keys(), other.server_keys(), other.client_keys()}) == 4


def test_public_key_belongs_to_the_clamped_scalar():
    keys = ClusterSecret(b"\1" * 32).server_keys()
    scalar = z85.decode(keys.secret)
    assert scalar[0] & 7 == 0
    assert scalar[31] & 0xC0 == 0x40
    assert zmq.curve_public(keys.secret) == keys.public


def test_nothing_secret_is_printed():
    secret = ClusterSecret(b"\1" * 32)
    keys = secret.server_keys()
    assert repr(secret) == repr(ClusterSecret(b"\1" * 32, b"\2" * 32)) == "ClusterSecret(...)"
    assert keys.secret.decode() not in repr(keys)
    assert keys.secret.decode() not in f"{keys}"

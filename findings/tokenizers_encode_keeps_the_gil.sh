#!/usr/bin/env bash
# tokenizers 0.23.3.
#
# Tokenizer.encode keeps Python's global lock for as long as it computes, so that no other thread of the process runs
# meanwhile, an event loop's included: to call it in a worker thread helps nothing. encode_batch_fast, and encode_batch,
# of a list with the same one text let go of the lock, and give the same ids.
#
# Seen (share of the time of the call for which a thread that only sleeps a millisecond at a time was kept waiting):
#   encode: nearly all of it
#   encode_batch_fast: nearly nothing
#   same ids: yes
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cat > "$work/run.py" <<'P'
import threading, time
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE(unk_token="?"))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
words = "the quick brown fox jumps over the lazy dog again and again ".split()
tokenizer.train_from_iterator([" ".join(words)] * 20, trainers.BpeTrainer(vocab_size=300, special_tokens=["?"]))
text = " ".join(words) * 30_000


def measured(call):
    ends, gap, last = False, 0.0, time.monotonic()

    def tick():
        nonlocal gap, last
        while not ends:
            time.sleep(0.001)
            now = time.monotonic()
            gap, last = max(gap, now - last), now

    thread = threading.Thread(target=tick)
    thread.start()
    time.sleep(0.05)
    gap, began = 0.0, time.monotonic()
    ids = call()
    took = time.monotonic() - began
    time.sleep(0.05)
    ends = True
    thread.join()
    return ids, gap / took


one, held = measured(lambda: tokenizer.encode(text).ids)
batch, free = measured(lambda: tokenizer.encode_batch_fast([text])[0].ids)
print(f"encode: {'nearly all of it' if held > 0.8 else 'less'} ({held:.2f})")
print(f"encode_batch_fast: {'nearly nothing' if free < 0.2 else 'more'} ({free:.2f})")
print(f"same ids: {'yes' if one == batch else 'no'}")
assert held > 0.8 and free < 0.2 and one == batch
P
"$work/venv/bin/python" "$work/run.py"

#!/bin/sh
# Collects, as wheels, what kvray's engine, workers and node cache need beside a machine's torch, triton, transformers,
# numpy, psutil, pyarrow, rich and uvloop: for a GPU machine from which nothing else can be reached.
#
#     sh benchmarks/gpu/wheels.sh FOLDER [PYTHON] [ucx]        FOLDER: .wheels; PYTHON: 3.12; ucx: the road "ucx" too
#
# There: python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/*.whl; export PYTHONPATH=/tmp/site
set -eu
folder=$1 version=${2:-3.12} road=${3:-}
here=$(cd "$(dirname "$0")" && pwd)
pinned=$(grep -iE '^(blake3|llguidance|msgspec|pyzmq|referencing|rpds-py)==' "$here/../../constraints.txt")
platforms=
for number in 39 35 34 31 28 27 26 24 17 12; do platforms="$platforms --platform manylinux_2_${number}_x86_64"; done
mkdir -p "$folder"
# shellcheck disable=SC2086 # words, each an argument
collect() {
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
        --python-version "$version" $platforms --platform manylinux2014_x86_64 --dest "$folder" "$@"
}
# shellcheck disable=SC2086
collect $pinned
if [ "$road" = ucx ]; then
    collect 'ucxx-cu13==0.52.*' 'libucxx-cu13==0.52.*' 'libucx-cu13>=1.19,<1.22' 'rmm-cu13==26.10.*' \
        'librmm-cu13==26.10.*' rapids-logger
fi
du -sh "$folder"

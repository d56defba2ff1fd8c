#!/usr/bin/env bash
# The standing job for one GPU: every test and measurement that needs one, within nine minutes, without a network.
#
#     bash bench/device.sh          # on the GPU's machine
#     bash bench/device.sh --dry    # the same on a CPU, at tiny sizes: whether the job itself works
#
# Results are written to $OUT, or to bench/results where that is not set; those of --dry to a temporary folder then.
set -u
cd "$(dirname "$0")/.." || exit
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" -m s1engine.bench.device.job "$@"

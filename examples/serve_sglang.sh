#!/usr/bin/env bash
# Serves a prepared checkpoint with SGLang 0.5.23. No flag belongs to nvfp4-prep: the checkpoint's stamp is enough.
#
#   examples/serve_sglang.sh CHECKPOINT tp  8    tensor parallel on one host; every rank holds a share of each expert
#   examples/serve_sglang.sh CHECKPOINT ep  8    tensor parallel attention, whole experts spread over the ranks
#   examples/serve_sglang.sh CHECKPOINT dep 8    data parallel attention, whole experts spread over the ranks
#
# Needs GPUs of compute capability 10.0 or 10.3. Needs once: pip install . sglang==0.5.23 (in a clone)
# What follows the number of GPUs goes to the server as it is: --port 8001, or --trust-remote-code for a checkpoint with
# Python code of its own.
# FAST=1 adds --load-format nvfp4_prep: each rank reads its own bytes only. DRY_RUN=1 prints the command only.
set -euo pipefail

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; }
case ${1:-} in -h | --help) usage; exit 0 ;; esac
if [ $# -lt 3 ]; then
    usage >&2
    exit 2
fi
checkpoint=$1 mode=$2 gpus=$3
shift 3
if ! [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
    echo "the number of GPUs must be a number from 1, not $gpus" >&2
    exit 2
fi

arguments=(-m sglang.launch_server --model-path "$checkpoint")
case $mode in
    tp) arguments+=(--tp "$gpus") ;;
    ep) arguments+=(--tp "$gpus" --ep "$gpus") ;;
    dep) arguments+=(--tp "$gpus" --ep "$gpus" --dp "$gpus" --enable-dp-attention) ;;
    *) echo "mode must be tp, ep or dep, not $mode" >&2; exit 2 ;;
esac
if [ "${FAST:-0}" = 1 ]; then
    arguments+=(--load-format nvfp4_prep)
fi
arguments+=("$@")
if [[ " $* " != *" --trust-remote-code "* ]]; then
    for file in config.json tokenizer_config.json; do
        if grep -qs '"auto_map"' "$checkpoint/$file"; then
            echo "note: $file names Python code in $checkpoint (auto_map). If the server asks for --trust-remote-code," \
                "read that code, then append the option." >&2
        fi
    done
fi

echo "python$(printf ' %q' "${arguments[@]}")" >&2
if [ "${DRY_RUN:-0}" = 1 ]; then
    exit 0
fi
exec python "${arguments[@]}"

#!/usr/bin/env bash
# Train on all GPUs of this machine (or on the CPU where there is none); a lost process is restarted with the others
# from the newest checkpoint.
#
#   launch/torchrun.sh recipes/small.yaml data.path=data/mine --out runs/mine
#
# NPROC         processes on this machine; by default one for each GPU
# MAX_RESTARTS  restarts after a lost process (default 3)
#
# Several machines: the same line on each of them, with
# NNODES        how many they are
# RDZV_ENDPOINT host:port of one of them, the same on all
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  exit 2
fi

gpus=0
if command -v nvidia-smi > /dev/null; then
  gpus=$(nvidia-smi --list-gpus | wc -l)
fi
processes=${NPROC:-$((gpus > 0 ? gpus : 1))}

if [[ ${NNODES:-1} -gt 1 ]]; then
  : "${RDZV_ENDPOINT:?host:port of one of the NNODES machines}"
  meeting=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-tokenformer}")
else
  meeting=(--standalone)
fi

exec torchrun "${meeting[@]}" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-3}" \
  -m tokenformer train "$@" --resume

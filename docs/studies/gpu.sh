#!/bin/sh
# The study of the union on one GPU: sh docs/studies/gpu.sh FOLDER [SECONDS]. Run it again to resume.
# Clips, autoencoder and latents are made on the CPU and are not counted in SECONDS (default 1500).
set -e
folder=${1:?name a folder for the study}
seconds=${2:-1500}
here=$(dirname "$0")
lutetia study "$here/gpu.toml" --folder "$folder" --device cuda --plan
CUDA_VISIBLE_DEVICES= lutetia study "$here/gpu.toml" --folder "$folder" --device cpu --prepare
status=0
timeout --signal TERM "$seconds" lutetia study "$here/gpu.toml" --folder "$folder" --device cuda || status=$?
test $status -eq 0 || test $status -eq 124 || exit $status
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader > "$folder/results/gpu.txt"
echo "tables and curves so far: $folder/results/README.md"

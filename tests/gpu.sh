#!/bin/bash
# What this project has not measured, since no GPU was at hand: half an hour on one of 80 GB.
#
#   bash tests/gpu.sh DATA ARMS OUT    (brain MRI; what tests/pretrained_arms.py wrote; a new folder)
#   TINY=1 bash tests/gpu.sh ...       (the same commands at a tiny size, on a CPU, a few images)
#
# Writes to OUT: gpu_tests.txt, step.json (our loop beside the notebook's, share of peak, memory),
# times/ (DINO beside CASS, the paper's arms and size), gpu/ (the protocol at 224 px; seeds as far as
# 30 minutes go). Nothing is downloaded. Called again, it keeps what is finished.
set -u
cd "$(dirname "$0")/.."
data=$(realpath "$1") out=$(realpath -m "$3")
mkdir -p "$out" && ln -sfn "$(realpath "$2")" "$out/arms" && cd "$out" || exit 2
export PYTHONPATH=$OLDPWD CASS_CACHE=$out/cache
end=$(($(date +%s) + 60 * ${MINUTES:-28}))
left() { echo $((end - $(date +%s) > 0 ? end - $(date +%s) : 1)); }
split="--split $OLDPWD/results/pretrained/brain_mri.csv"
step="--preset paper --steps 20 --workers 8" scale="" epochs=2 more=""
[ "${TINY:-}" ] && split="" step="--preset small --steps 2" scale="--scale small" epochs=1
[ "${TINY:-}" ] && more="--fracs 0.1 --epochs 1"

tests="tests"  # of which --device auto takes the GPU
[ "${TINY:-}" ] && tests="tests/test_losses.py"
(cd "$PYTHONPATH" && timeout 400 python -m pytest -q $tests > "$out/gpu_tests.txt" 2>&1)
tail -n 1 gpu_tests.txt
[ -e step.json ] || timeout "$(left)" python -m tools.benchmark step $step --out step.json
timeout "$(left)" python -m tools.experiments --table times_paper $scale --data "$data" $split \
  --epochs $epochs --seeds 0 1 2 --out times --work runs
for seed in 0 1 2 3 4 5 6 7 8 9; do
  timeout "$(left)" python -m tools.experiments --table gpu --data "$data" $split $more \
    --seeds $seed --out gpu --work runs || break
  [ "${TINY:-}" ] && break
done
rm -rf runs cache arms

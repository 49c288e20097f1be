#!/bin/bash
# What this project has not measured, since no GPU was at hand: half an hour on one of 80 GB.
#
#   bash tests/gpu.sh DATA ARMS OUT    (brain MRI; what tests/pretrained_arms.py wrote; a new folder)
#   TINY=1 bash tests/gpu.sh ...       (on a CPU, a few images: small arms, then the rows at 84 px)
#
# Writes to OUT: gpu_tests.txt, step.json (our loop beside the notebook's, share of peak, memory),
# times/ (DINO beside CASS, the paper's arms and size, 333 images), gpu/ (three rows of the protocol
# at 224 px, with read-outs; seeds as far as 30 minutes go). Nothing is downloaded. Called again, it
# keeps what is finished. Exit status 1 where something failed, whose runs/*/output.txt stay.
set -u
[ $# -eq 3 ] && [ -d "$1" ] && [ -d "$2" ] || { echo "usage: bash tests/gpu.sh DATA ARMS OUT" >&2; exit 2; }
cd "$(dirname "$0")/.." && root=$PWD && cd "$OLDPWD" || exit 2
data=$(realpath "$1") arms=$(realpath "$2") out=$(realpath -m "$3") failed=0
mkdir -p "$out" && ln -sfn "$arms" "$out/arms" && cd "$out" || exit 2
export PYTHONPATH=$root CASS_CACHE=$out/cache
end=$(($(date +%s) + 60 * ${MINUTES:-28}))
left() { echo $((end - $(date +%s) > 0 ? end - $(date +%s) : 1)); }
split="--split $root/results/pretrained/brain_mri.csv" few="--split $root/results/times/split.csv"
tests="tests/test_cass.py tests/test_losses.py tests/test_swa.py tests/test_resume.py"
step="--preset paper --steps 20 --workers 8" times="$few --epochs 3" rows=(--table gpu) fracs=""
if [ "${TINY:-}" ]; then
  tests="tests/test_losses.py" step="--preset small --steps 2" split="" fracs="--fracs 0.1 1"
  times="--scale small --epochs 1" rows=(--table pretrained --fracs 0.1 --epochs 1 --only)
  rows+=("direct use" "equation 1, 1e-3" "recipe: anchor")
fi

# of these tests --device auto takes the GPU
(cd "$root" && timeout 240 python -m pytest -q $tests > "$out/gpu_tests.txt" 2>&1) || failed=1
tail -n 1 gpu_tests.txt
[ -e step.json ] || timeout "$(left)" python -m tools.benchmark step $step --out step.json || failed=1
timeout "$(left)" python -m tools.experiments --table times_paper --data "$data" $times \
  --seeds 0 1 2 --out times --work timed || failed=1
for seed in 0 1 2 3 4 5 6 7 8 9; do
  timeout "$(left)" python -m tools.experiments "${rows[@]}" --data "$data" $split \
    --seeds $seed --out gpu --work runs
  status=$?
  [ $status -eq 124 ] && break # out of time
  [ $status -eq 0 ] || failed=1
  python "$root/tests/readouts.py" runs $fracs && python "$root/tests/evidence.py" collect gpu/cells runs || failed=1
  [ "${TINY:-}" ] && break
done
[ $failed -eq 0 ] && rm -rf runs timed cache arms
exit $failed

# What the scripts beside it share; they source it. Every command is printed before it runs; --dry or DRY=1 only prints.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

DEVICES=${DEVICES:-8}                          # GPUs of this machine
DATA=${DATA:-../data}                          # holds coco/, ADEChallengeData2016/, VOCdevkit/, PhraseCut/, ... (README)
RUNS=${RUNS:-runs}
PYTHON=${PYTHON:-python}
DRY=${DRY:-0}
if [ "${1:-}" = --dry ]; then DRY=1; fi

run() {
  printf '%q ' "$@"
  echo
  if [ "$DRY" != 1 ]; then "$@"; fi
}

# share TOTAL: what each process has of a batch; the recipes are for a total, and learning rates are not scaled.
share() {
  if [ $(($1 % DEVICES)) != 0 ]; then
    echo "a batch of $1 cannot be shared by $DEVICES devices" >&2
    exit 2
  fi
  echo $(($1 / DEVICES))
}

# train NAME TOTAL_BATCH OPTION...: a run in $RUNS/NAME, with a batch of TOTAL_BATCH in all. Stopped, it goes on at its last
# checkpoint.
train() {
  local name=$1 batch continued=()
  batch=$(share "$2")
  if compgen -G "$RUNS/$name/checkpoints/last*.ckpt" > /dev/null; then continued=(--ckpt_path last); fi
  run "$PYTHON" -m pmpseg.fit "${@:3}" --data.batch_size "$batch" --trainer.devices "$DEVICES" \
    --trainer.default_root_dir "$RUNS/$name" ${continued[@]+"${continued[@]}"}
}

# score NAME OPTION...: the row of the table of all benchmarks, in $RUNS/NAME/benchmarks/table.md unless --out says otherwise.
score() {
  run "$PYTHON" -m pmpseg.evaluate "$RUNS/$1/model" --benchmark all --root "$DATA" --devices "$DEVICES" "${@:2}"
}

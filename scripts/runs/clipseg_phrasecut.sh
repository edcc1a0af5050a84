#!/usr/bin/env bash
# CLIPSeg (arXiv 2112.10003) on PhraseCut+, and its tables: 3 (PhraseCut), 4 (zero-shot), 5 and 7 (Pascal-5i).
#   DEVICES=1 DATA=../data scripts/runs/clipseg_phrasecut.sh [--dry]
#
# Expected:
#   devices  1 GPU: 64 images a step. DEVICES may be any divisor of 64.
#   hours    unknown: no figure was found, and no run on PhraseCut has been made. 20,000 steps are 5.6 hours for each second of a
#            step (20,000 / 3,600).
#   memory   of a GPU, unknown for the activations; about 1.1 M parameters learn (paper), on a frozen ViT-B/16.
# Seven runs: of all phrases, and one without the classes that are then asked, for each of Pascal-5i's folds and the zero-shot
# splits.
DEVICES=${DEVICES:-1}
source "$(dirname "$0")/common.sh"

learn() { train "$1" 64 -c conf/clipseg_phrasecut.yaml --data.root "$DATA/PhraseCut" "${@:2}"; }
judge() { run "$PYTHON" -m pmpseg.evaluate "$RUNS/$1/model" -c "$2" --devices "$DEVICES" --out "$RUNS/$1/$3.json" "${@:4}"; }

# with ROOT FILE OPTION=VALUE...: a copy of a file of conf/eval with another place of the data and other arguments; prints its
# name. (It is written with --dry, too.)
with() {
  local copy
  copy=$RUNS/eval/$(basename "$2" .yaml)$(printf '_%s' "${@:3}" | tr -c '[:alnum:]_\n' _).yaml
  mkdir -p "$(dirname "$copy")"
  "$PYTHON" -c 'import sys, yaml
root, file, copy, *changes = sys.argv[1:]
config = yaml.safe_load(open(file))
config["data"]["init_args"] |= {"root": root} | {k: yaml.safe_load(v) for k, v in (c.split("=") for c in changes)}
yaml.safe_dump(config, open(copy, "w"))' "$1" "$2" "$copy" "${@:3}"
  echo "$copy"
}

learn clipseg_phrasecut
judge clipseg_phrasecut "$(with "$DATA/PhraseCut" conf/eval/phrasecut.yaml image_size=352)" phrasecut
for fold in 0 1 2 3; do
  learn clipseg_pascal5i_$fold --data.remove_classes "[pascal5i-$fold]"
  for form in image text; do
    judge clipseg_pascal5i_$fold "$(with "$DATA/VOC2012" conf/eval/pascal5i.yaml fold=$fold)" pascal5i_$form --prompt-form $form
  done
done
for pairs in 5 2; do
  learn clipseg_zero_shot_$pairs --data.remove_classes "[zero-shot-$pairs]"
  judge clipseg_zero_shot_$pairs "$(with "$DATA/VOC2012" conf/eval/pascal_zero_shot.yaml unseen_pairs=$pairs)" zero_shot
done

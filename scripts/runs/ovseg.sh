#!/usr/bin/env bash
# OVSeg (arXiv 2210.04150) from nothing to the rows of its table 1: stage 1, pairs mined from COCO's captions, the CLIP adapted to
# masked regions, both together on the benchmarks; and the oracles of its analysis, which tell where a two-stage model loses.
#   DEVICES=8 DATA=../data scripts/runs/ovseg.sh [--dry]
#
# Expected:
#   devices  8 GPUs for stage 1 (32 images a step in all). Stage 2: 256 pairs for ViT-L/14 and 1,024 for ViT-B/16, as the paper
#            says; its released scripts are for 4 GPUs, with 128 and 512 pairs. Pairs are mined on one GPU.
#   hours    unknown: no figure for training was found. Stage 1 has 120,000 steps, 33.3 hours for each second of a step. Mining
#            goes through 118,287 images; the paper's time for one on an A5000 is 0.2 s of MaskFormer and 0.6 s of CLIP (A.9),
#            which would be 26 hours (computed; for other software than this). Stopped, it goes on where it was. Stage 2: 10
#            epochs.
#   memory   of a GPU, unknown. Measured on a CPU: the R-101c's two steps of two 512x512 images in float32 took 5.7 GiB, the whole
#            process; images with more classes take more, since losses look at all pixels of every mask. (--model.num_points 12544
#            is Mask2Former's way, and no longer OVSeg's.) Weights, gradients and AdamW's moments in stage 1 are 16 bytes a
#            parameter (computed): R-101c 61.1 M 0.91 GiB, Swin-B 102.8 M 1.53 GiB.
#   disk     mining and stage 2 read images from a folder: unpack train2017.zip, and the captions of annotations_trainval2017.zip.
#
# Not the same: OVSeg asks one text for each class, which for ADE20K is all of its words ("road, route" in a template); here it is
# the first of them (--names-only), as it is of COCO-Stuff's in training.
source "$(dirname "$0")/common.sh"

for setting in r101c swin_b; do
  case $setting in
    r101c) clip=openai/clip-vit-base-patch16 region=vit_b16 pairs_a_step=1024 threshold=0.5 size=512 longest=2048 ;;
    swin_b) clip=openai/clip-vit-large-patch14 region=vit_l14 pairs_a_step=256 threshold=0.4 size=640 longest=2560 ;;
  esac
  stage_1=ovseg_$setting
  stage_2=region_coco_stuff_$region
  pairs=$RUNS/pairs_$setting/pairs.csv
  asked=(--names-only --image-size $size --max-size $longest)

  train $stage_1 32 -c conf/ovseg_$setting.yaml --data.root "$DATA/coco"
  if [ ! -f "$pairs" ]; then
    run mkdir -p "$(dirname "$pairs")"
    run "$PYTHON" scripts/mine_pairs.py --images "$DATA/coco/train2017" \
      --captions "$DATA/coco/annotations/captions_train2017.json" --captions-per-image 1 --parser nltk \
      --proposals "$RUNS/$stage_1/model" --blind --clip $clip --mask-threshold $threshold --out "$pairs"
  fi
  train $stage_2 $pairs_a_step -c conf/$stage_2.yaml --data.pairs "$pairs" --data.images "$DATA/coco/train2017"

  score $stage_1 "${asked[@]}" --name "MaskFormer only, $setting" --out "$RUNS/$stage_1/stage_1"
  score $stage_1 "${asked[@]}" --region $clip --region-templates vild --ensemble-weight paper --name "CLIP as it is, $setting" \
    --out "$RUNS/$stage_1/clip"
  score $stage_1 "${asked[@]}" --region "$RUNS/$stage_2" --region-templates vild --ensemble-weight paper --name "OVSeg $setting" \
    --out "$RUNS/$stage_1/ovseg"
  score $stage_1 "${asked[@]}" --region $clip --region-templates vild --oracle masks --name "oracle masks, $clip" \
    --out "$RUNS/$stage_1/oracle_masks"
  score $stage_1 "${asked[@]}" --oracle classes --name "oracle classes, $setting" --out "$RUNS/$stage_1/oracle_classes"
done

#!/bin/sh
# Makes demo/data and demo/base again from the seed: data and tokenizer, random weights, pretraining (GPU), merge.
set -eu
cd "$(dirname "$0")/.."
python demo/make_data.py --pretrain 1000000
python demo/make_base.py
python train.py --config demo/pretrain.toml --overwrite true --compile true
rm -r demo/base
python merge.py --model demo/pretrain/init --adapter demo/pretrain/run/adapter --output demo/base

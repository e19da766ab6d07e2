#!/bin/bash
# Starts the same command on every host of a Cloud TPU VM, and shows what they write:
#
#   launch/tpu_vm.sh NAME ZONE -- jaxblip train --config=FILE.py --workdir=gs://BUCKET/RUN
#
# jaxblip is installed on each host beforehand, in the folder that TPU_VM_FOLDER names (jaxblip):
#
#   launch/tpu_vm.sh NAME ZONE -- pip install -e '.[tpu]'
#
# The command goes on when the connection is lost. Started again after a preemption it resumes.
# DRY_RUN=1 prints what would be run.
set -eu

if [ $# -lt 4 ] || [ "$3" != -- ]; then
    echo "launch/tpu_vm.sh: write launch/tpu_vm.sh NAME ZONE -- jaxblip train --config=FILE.py --workdir=DIR" >&2
    exit 2
fi
name=$1 zone=$2
shift 3

printf -v command ' %q' "$@"
folder=$(printf %q "${TPU_VM_FOLDER:-jaxblip}")
# Without nohup the end of the connection would end the command. tail shows it until it ends.
remote="cd $folder && { nohup$command > jaxblip.log 2>&1 & } && tail --pid=\$! -n +1 -f jaxblip.log && wait \$!"

start=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$remote")
if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${start[@]}"
    echo
    exit
fi
exec "${start[@]}"

#!/usr/bin/env bash
# A training run on several machines over ssh, one process a machine with all of its GPUs:
#
#   scripts/train_ssh.sh "node0 node1" --preset sub3min --mesh 16 --sequences 16 --data data/fineweb10B --out runs/first
#
# The machines share this folder, under the same path, with .venv set up; ssh asks for no password; and PORT (12345) of
# the first is open to the others. Ctrl-C, or SIGTERM to this script, ends the run after a checkpoint.
set -euo pipefail
if [ $# -lt 1 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
read -ra hosts <<<"$1"
shift
cd "$(dirname "$0")/.."
port=${PORT:-12345}
id_file=runs/.train_ssh.$port.pid
folder=$(printf '%q' "$PWD")
train="${PYTHON:-.venv/bin/python} scripts/train.py --coordinator ${hosts[0]}:$port --processes ${#hosts[@]}"
[ $# -eq 0 ] || train+=$(printf ' %q' "$@")

clients=()
for i in "${!hosts[@]}"; do
    note=
    [ "$i" -gt 0 ] || note="mkdir -p runs && echo \$\$ > $id_file && "
    ssh "${hosts[i]}" "cd $folder && ${note}exec $train --process-id $i" </dev/null &
    clients+=($!)
done

stop() { # the first process tells the others
    ssh "${hosts[0]}" "kill -TERM \$(cat $folder/$id_file)" </dev/null || true
}
trap stop INT TERM

status=0
for client in "${clients[@]}"; do
    until wait "$client"; do
        code=$?
        # A trapped signal ends the wait, not the client.
        kill -0 "$client" 2>/dev/null || { status=$code && break; }
    done
done
ssh "${hosts[0]}" "rm -f $folder/$id_file" </dev/null
exit "$status"

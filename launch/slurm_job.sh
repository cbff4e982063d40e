# ---- The same in every job -------------------------------------------------------------------

set -u
job=$SLURM_JOB_ID
# By the number of an array's last job Slurm means the whole array.
target=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
target=${target:-$job}
attempt=${SLURM_RESTART_COUNT:-0}
say() { printf '%s [job %s, start %s] %s\n' "$(date +%FT%T)" "$job" "$((attempt + 1))" "$*"; }

# Both from the first line on: untrapped, either would end this script before the ranks have saved.
warned=0 ended=0 late=0 ranks='' reminder=''
trap 'warned=1; say "asked to save: the time limit is near"; remind' USR2
# Ignored from then on: Slurm repeats it, and sends it to what `shrink` starts as well.
trap 'trap "" TERM; ended=1; say "ended by Slurm: cancelled, preempted, requeued, out of time, or a node is lost"; shrink' TERM

records=$run_dir/jobs
state=$records/$job.failures    # failures in a row, and the checkpoint step they were counted at
bad_nodes=$records/$job.bad-nodes
excluded=$records/$job.excluded    # nodes that were left out before
started=$records/$job.started
trains=0; case $launcher in srun | torchrun) trains=1 ;; esac

# The largest number of nodes, up to $1, that shares the global batch evenly; 0 if none does.
fitting() {
  local count best=0
  if [ ${#node_counts[@]} = 0 ]; then echo "$1"; return; fi
  for count in "${node_counts[@]}"; do
    if [ "$count" -le "$1" ] && [ "$count" -gt "$best" ]; then best=$count; fi
  done
  echo "$best"
}

# A job that has lost a node waits for another one; where it may go on with fewer, it says so now,
# while Slurm puts it back into the queue. A range from the start would not do: a Slurm that
# preempts gives such a job the fewest nodes although more are idle.
# shellcheck disable=SC2329    # the trap calls it
shrink() {
  local down left fit _
  if [ "$min_nodes" -ge "$max_nodes" ] || [ -z "${list:-}" ]; then return; fi
  down=$(sinfo --noheader --Node --nodes="$list" --states=down,drain,fail --format=%N | sort -u | wc -l)
  if [ "$down" = 0 ]; then return; fi
  left=$((num_nodes - down)) fit=$(fitting "$left")
  if [ "$fit" -lt "$min_nodes" ] || [ "$fit" = 0 ]; then return; fi
  for _ in 1 2 3 4 5; do
    # The tasks as well, or Slurm goes on looking for nodes for all of them.
    if scontrol update JobId="$target" NumNodes="$fit-$max_nodes" NumTasks=$((fit * tasks_per_node)) \
      2>/dev/null; then
      say "lost $down node(s): goes on with $fit or more"
      return
    fi
    sleep 1
  done
  say "lost $down node(s); to go on with fewer: scontrol update JobId=$target NumNodes=$fit NumTasks=$((fit * tasks_per_node))"
}

# What every task begins with. A signal that is ignored stays so over exec: a warning that comes
# while Python still imports kills nobody. exec: no shell stands between Slurm and the rank.
# shellcheck disable=SC2016
wrapper='trap "" USR2; mkdir -p "$TORCH_EXTENSIONS_DIR"; exec "$@"'

# step NAME TASKS_PER_NODE WORDS...: one srun over the nodes; its code is the highest of its tasks'.
# No --kill-on-bad-exit: ranks find out by themselves that one is lost, and say which; --wait ends
# those that do not.
step() {
  local name=$1 tasks=$2 pid code; shift 2
  srun --job-name="$name" --nodes="$num_nodes" --nodelist="$list" --ntasks=$((num_nodes * tasks)) \
    --ntasks-per-node="$tasks" --cpus-per-task="$cpus_per_task" --wait="$lost_seconds" --label \
    "${step_options[@]}" bash -c "$wrapper" "$name" "${inside[@]}" "$@" &
  pid=$!
  if [ "$name" = ranks ]; then ranks=$pid; remind; fi
  while wait "$pid"; kill -0 "$pid" 2>/dev/null; do :; done    # a trap ended the wait, not srun
  wait "$pid"; code=$?
  return "$code"
}

# Hands the warning on to the ranks. Through scancel: srun itself would cancel a step that it is
# still making, and TERM would make it kill the ranks. Again and again: they may not listen yet.
remind() {
  if [ "$warned" = 0 ] || [ -z "$ranks" ] || [ -n "$reminder" ]; then return; fi
  while kill -0 "$ranks" 2>/dev/null; do
    scancel --quiet --signal=USR2 "$target"
    sleep 5
  done &
  reminder=$!
}

# The newest whole checkpoint; 0 before the first.
newest_step() {
  local path newest=0 number
  for path in "$run_dir"/checkpoints/step-*; do
    number=${path##*/step-}
    [[ $number =~ ^[0-9]+$ ]] || continue
    if [ $((10#$number)) -gt "$newest" ]; then newest=$((10#$number)); fi
  done
  echo "$newest"
}

# An exit code that starting again cannot help, from srun or from any rank's last word: srun tells
# only the highest code, and the rank that found the cause may have a lower one.
final_code() {
  local code=$1 word final
  for final in 78 93 79 65 2; do
    if [ "$code" = "$final" ]; then echo "$final"; return; fi
    for word in "$run_dir"/faults/fault-*.json; do
      if [ "$word" -nt "$started" ] \
        && grep -qE "\"exit_code\": ${final}[,}]" "$word"; then echo "$final"; return; fi
    done
  done
}

# Removes this job's folders from the nodes' own disks, those of starts that were ended as well.
# shellcheck disable=SC2016
tidy() {
  if [[ $TORCH_EXTENSIONS_DIR != "$own"/* ]] || [ "$late" = 1 ]; then return; fi
  timeout 30 srun --overlap --nodes="$num_nodes" --nodelist="$list" --ntasks="$num_nodes" \
    --ntasks-per-node=1 bash -c 'rm -rf -- "$0".*' "${own%.*}" || say "$own is left on a node"
}

finish() { tidy; exit "$1"; }

# Back into the queue, or out with code $1. Not once Slurm has ended the job: that would bring a
# cancelled one back. A controller that is away for a while is no reason to lose the job.
put_back() {
  local answer='' _
  for _ in {1..30}; do
    if [ "$ended" = 1 ] && [ "$late" = 0 ]; then exit "$1"; fi
    if answer=$(scontrol requeue "$target" 2>&1); then return; fi
    case $answer in
      *contact* | *onnect* | *timed\ out*) say "the controller does not answer: $answer" ;;
      *) break ;;
    esac
    sleep 10 & wait $!
  done
  if [ "$ended" = 1 ] && [ "$late" = 0 ]; then exit "$1"; fi
  say "this cluster refuses to requeue; submit the job again: $answer"
  exit "$1"
}

requeue() {
  say "$1: back into the queue"
  tidy
  put_back "$2"
  # Slurm's TERM comes now, for which `shrink` may have to be there; it may have come already.
  for _ in {1..60}; do
    if [ "$ended" = 1 ]; then break; fi
    sleep 1 & wait $!
  done
  exit "$2"
}

# A failure counts unless a newer checkpoint was made since the last one.
again_or_give_up() {
  local code=$1 failures=0 step=-1 now
  if [ -e "$state" ]; then read -r failures step <"$state"; fi
  now=$(newest_step)
  # It may have ended what counts as well.
  if [ "$ended" = 1 ] && [ "$late" = 0 ]; then exit "$code"; fi
  if [ "$now" -gt "$step" ]; then failures=0; fi
  failures=$((failures + 1))
  if ! echo "$failures $now" >"$state"; then    # a full disk: uncounted, it would fail for ever
    say "failures cannot be counted in $state: giving up, code $code"
    finish "$code"
  fi
  if [ "$failures" -gt "$max_failures" ]; then
    say "failed $failures times since step $now: giving up, code $code"
    finish "$code"
  fi
  requeue "failure $failures of $max_failures since step $now, code $code" "$code"
}

# Not the highest code but who asked decides on 75: otherwise a failed rank, after which the others
# stop in good order, would be started again for ever.
saved() {
  local stop left
  if [ "$trains" = 1 ]; then    # what works beside a run stops and goes on for itself
    stop=$(grep '"event": "stop"' "$run_dir/events.jsonl" 2>/dev/null | tail -n 1)
    left=$((${SLURM_JOB_END_TIME:-9999999999} - $(date +%s)))
    if [ -e "$run_dir/stop" ]; then say "stopped by \`jepa stop\`"; finish 75; fi
    if [[ $stop == *"the time limit is near"* ]] && [ "$left" -gt $((2 * grace_seconds)) ]; then
      say "stopped by stop.at or stop.max_hours of its configuration"; finish 75
    fi
    if grep -qs '"is_done": false' "$run_dir/rewinds.json"; then    # limited by the run itself
      requeue "going back to an older step, after a spike" 75
    fi
  fi
  if [ "$warned" = 1 ] || [ "$(newest_step)" -gt "$first_step" ]; then
    requeue "saved at step $(newest_step)" 75
  fi
  again_or_give_up 75
}

# Takes the nodes that failed the checks out of this job, for all its further starts.
exclude_bad_nodes() {
  local bad before all _
  bad=$(paste -sd, "$bad_nodes")
  if grep -qsxFf "$bad_nodes" "$excluded" || ! cat "$bad_nodes" >>"$excluded"; then
    say "bad: $bad, and leaving them out did not help"
    again_or_give_up 76
  fi
  before=$(scontrol show job "$target" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p' | head -n 1)
  all=$bad; if [ -n "$before" ] && [ "$before" != "(null)" ]; then all=$before,$bad; fi
  say "bad: $bad; queued again without them"
  # Only a job that waits may be changed. It does not start again before this script is over; not
  # held, because Slurm may hold it once more after the release, and then nobody lets it go.
  put_back 76
  for _ in {1..25}; do    # then Slurm kills this script, and the next start counts
    if scontrol update JobId="$target" ExcNodeList="$all"; then break; fi
    sleep 1 & wait $!
  done
  exit 76
}

# symmetric-run calls `ray stop` at its end, which ends every Ray of this user on the node, that of
# another job as well. Here `stop` ends what carries this job's number.
own_ray() {
  mkdir -p "$records/$job.bin"
  cat >"$records/$job.bin/ray" <<SHIM
#!/bin/bash
case " \$* " in *" --head "*) set -- "\$@" --include-dashboard=false ;; esac
if [ "\$1" != stop ]; then exec $(printf %q "${agent[0]}") -m ray.scripts.scripts "\$@"; fi
end_own() {
  for process in /proc/[0-9]*; do
    if grep -qzxF "SLURM_JOB_ID=\$SLURM_JOB_ID" "\$process/environ" \
      && grep -qzE '^ray::|/ray/(core|dashboard|autoscaler|_private)/' "\$process/cmdline"
    then kill "-\$1" "\${process#/proc/}"; fi
  done 2>/dev/null
}
end_own TERM; sleep 3; end_own KILL    # the server of the cluster's state may not go at once
exit 0
SHIM
  chmod 755 "$records/$job.bin/ray"
}

mkdir -p "$records" || exit 74
# Asked for since the last start began, when nobody was there to obey.
if [ "$trains" = 1 ] && [ -e "$started" ] && [ "$run_dir/stop" -nt "$started" ]; then
  say "stopped by \`jepa stop\` before it began"
  exit 75
fi
touch "$started"

# An array's job has a value of its own; in its words {} stands for it.
if [ ${#each[@]} -gt 0 ]; then
  value=${each[${SLURM_ARRAY_TASK_ID:-0}]}
  # Quoted, or bash 5.2 takes an & in the value for what was matched.
  for at in "${!command[@]}"; do command[at]=${command[at]//'{}'/"$value"}; done
fi

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
num_nodes=$(fitting ${#hosts[@]})
if [ "$num_nodes" = 0 ]; then
  say "no number of nodes up to ${#hosts[@]} shares the global batch evenly: ${node_counts[*]}"
  exit 78
fi
list=$(IFS=,; printf %s "${hosts[*]:0:num_nodes}")
say "runs on $num_nodes of ${#hosts[@]} nodes: $list"

# Environments that are loaded here seldom bear to be read with every variable declared.
set +u; setup || say "setup ended with code $?"; set -u

# Ports and meeting point from the job's number: two jobs on one node never meet. Below 32768,
# from where on the kernel hands out ports to anybody.
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + job % 12000))
# A site's --export=NONE would leave the tasks without all that is set here.
export SLURM_EXPORT_ENV=ALL
# Lines in the log at once; --unbuffered would make srun's output a terminal, with colours and bars.
export PYTHONUNBUFFERED=1
# A folder of this start alone: an operator's build that was killed leaves a lock behind, for
# which the next one would wait for ever.
own=$scratch/jepa-${SLURM_CLUSTER_NAME:-slurm}-$job.$attempt
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$own/torch_extensions}
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then    # not told by Slurm before 23.02
  ends=$(squeue --noheader --jobs="$target" --format=%e 2>/dev/null)
  # Of no answer `date` would make last midnight, and the run would stop at once.
  if [ -n "$ends" ] && ends=$(date -d "$ends" +%s 2>/dev/null); then
    export SLURM_JOB_END_TIME=$ends
  fi
fi

if [ ${#preflight[@]} -gt 0 ]; then
  rm -f "$bad_nodes"
  step preflight 1 "${preflight[@]}" --bad-nodes "$bad_nodes"; code=$?
  if [ "$ended" = 1 ]; then exit "$code"; fi
  if [ "$code" != 0 ]; then say "the checks before training ended with $code"; fi
  case $code in
    0) ;;
    2 | 78) finish "$code" ;;
    *) if [ -s "$bad_nodes" ]; then exclude_bad_nodes; fi; again_or_give_up "$code" ;;
  esac
fi

first_step=$(newest_step)
if [ "$warned" = 1 ]; then requeue "asked to save before it began" 75; fi
case $launcher in
  single) step ranks 1 "${command[@]}" ;;
  srun)
    place=()
    # Alone, a run that goes on would start as many ranks itself as it had before.
    if [ $((num_nodes * tasks_per_node)) = 1 ]; then
      place=(env RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1)
    fi
    step ranks "$tasks_per_node" "${place[@]}" "${command[@]}" ;;
  torchrun) step ranks "$tasks_per_node" "${agent[@]}" "${command[@]:1}" ;;
  ray)
    # Whoever reaches Ray's ports may run code: only those who can read this file.
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$records/$job.token
    (umask 077; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
    own_ray
    # A node whose cluster has ended waits so long for it, a minute by default.
    export RAY_gcs_rpc_server_reconnect_timeout_s=${RAY_gcs_rpc_server_reconnect_timeout_s:-20}
    # shellcheck disable=SC2016
    step ranks "$tasks_per_node" bash -c 'PATH=$0:$PATH exec "$@"' "$records/$job.bin" \
      "${agent[@]}" "$MASTER_ADDR:$MASTER_PORT" --min-nodes "$num_nodes" \
      --num-cpus "$cpus_per_task" --disable-usage-stats \
      -- "${command[@]}" ;;
esac
code=$?
say "ended with $code"
if [ "$code" = 0 ]; then rm -f "$state" "$started" "$excluded"; finish 0; fi
if [ "$ended" = 1 ]; then    # Slurm queues it again, or was told not to; out of time it does neither
  why=$(scontrol show job "$target" | sed -n 's/.* Reason=\([^ ]*\).*/\1/p' | head -n 1)
  if [ "$why" != TimeLimit ] || [ "$trains" = 0 ]; then exit "$code"; fi
  say "out of time: grace_seconds is too little for a step and a save"
  late=1
fi
final=$(final_code "$code")
if [ -n "$final" ]; then say "code $final: starting again cannot help"; finish "$final"; fi
if [ "$code" = 75 ]; then saved; fi
again_or_give_up "$code"

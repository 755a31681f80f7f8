# Runs one attempt and remembers how it ended, whether or not the daemon that started it still lives.
#
# Started by the daemon in a session of its own, as: sh shim.sh MV CGROUP_PROCS_FILE...
# Descriptors: 0 one line, the attempt's folder; end of file instead: the daemon went away, leave. 3 the job's script,
# read once. 4, 5 arguments for the sandbox. 6, 7 a pipe between the two halves. 8, 9 a pipe that tells the daemon "j"
# (joined its cgroups) and "r" (the command runs); this half keeps the reading end, or the job would die of SIGPIPE
# when it starts just after the daemon died.

move=$1
shift
ulimit -c 0
umask 022

# The job's half: joins the cgroups while it is parked, for that takes the kernel several milliseconds.
(
    exec 0</dev/null 7>&- 8<&-
    for procs in "$@"; do
        echo 0 >"$procs" || exit 1
    done
    { echo 0 >/proc/self/oom_score_adj; } 2>/dev/null
    echo j >&9
    read -r directory <&6 || exit 0
    exec 6<&-
    cd "$directory" || exit 1
    exec >>output.log 2>&1
    . /dev/fd/3
) &
job=$!
exec 3<&- 4<&- 5<&- 6<&- 9>&-

read -r directory || exit 0
cd "$directory" || exit 1
read -r stat </proc/self/stat
set -f
set -- ${stat##*) }
shift 19
# The one place where an attempt is started: an exclusive create, so a second shim for the same attempt leaves.
set -C
{ echo "$$ $1" >started; } 2>/dev/null || exit 75
set +C
echo "$directory" >&7
exec 7>&-
wait "$job"
echo "$?" >exit.tmp
"$move" exit.tmp exit

# Bash reads this before the hook of an addon (BASH_ENV, set by `microk8s enable` and `disable`). A hook that goes on after
# a command has failed, and then ends with success, ends with the exit code of the first such command; what is
# part of a condition, or followed by ||, has not failed in this sense. Programs that the hook runs do not read this.
if [ "${MICROK8S_HOOK_OF:-}" = "$PPID" ]; then
	microk8s_failed=0 microk8s_line=0
	trap 'microk8s_status=$? microk8s_at=$LINENO
		if [ "$microk8s_failed" -eq 0 ]; then microk8s_failed=$microk8s_status microk8s_line=$microk8s_at; fi' ERR
	trap 'microk8s_status=$?
		if [ "$microk8s_status" -eq 0 ] && [ "$microk8s_failed" -ne 0 ]; then
			echo "$0: went on after line $microk8s_line had failed with exit code $microk8s_failed" >&2
			exit "$microk8s_failed"
		fi' EXIT
fi
unset BASH_ENV MICROK8S_HOOK_OF

#!/usr/bin/env bash
# What the hooks of addon repositories expect to source from here, or to call as
# `utils.sh FUNCTION ARGUMENTS`. Names and arguments are those of upstream's file of this name;
# the work is done by the program microk8s.

SNAP=${SNAP:-/snap/microk8s/current}
SNAP_DATA=${SNAP_DATA:-/var/snap/microk8s/current}
SNAP_COMMON=${SNAP_COMMON:-/var/snap/microk8s/common}
export SNAP SNAP_DATA SNAP_COMMON

# run_with_sudo [preserve_env] COMMAND...: as root
run_with_sudo() {
	if [ "$1" = preserve_env ]; then
		shift
	fi
	if [ "$EUID" -eq 0 ]; then
		"$@"
	else
		sudo -E "$@"
	fi
}

# exit_if_no_permissions: ends the hook where the caller may not use the cluster
exit_if_no_permissions() {
	if ! [ -r "$SNAP_DATA/credentials/client.config" ]; then
		"$SNAP/bin/microk8s" node-config arch >/dev/null # says so, and what to do
		exit 1
	fi
}

# exit_if_stopped: ends the hook on a stopped node
exit_if_stopped() {
	if [ -e "$SNAP_DATA/var/lock/stopped.lock" ]; then
		echo "microk8s is not running, try microk8s start" >&2
		exit 1
	fi
}

# exit_if_service_not_expected_to_start NAME: ends the hook, with success, where the service is kept from starting
exit_if_service_not_expected_to_start() {
	if [ -e "$SNAP_DATA/var/lock/no-$1" ]; then
		exit 0
	fi
}

# is_service_expected_to_start NAME: prints 1, or 0 where the service is kept from starting
is_service_expected_to_start() {
	if [ -e "$SNAP_DATA/var/lock/no-$1" ]; then
		echo 0
	else
		echo 1
	fi
}

# set_service_not_expected_to_start NAME: keeps a service of this node from starting
set_service_not_expected_to_start() { run_with_sudo touch "$SNAP_DATA/var/lock/no-$1"; }

# set_service_expected_to_start NAME: lets it start again
set_service_expected_to_start() { run_with_sudo rm -f "$SNAP_DATA/var/lock/no-$1"; }

# remove_vxlan_interfaces: removes what flannel and cilium have left of their tunnels
remove_vxlan_interfaces() {
	local link
	for link in $(ip -o link show type vxlan 2>/dev/null | sed -n 's/^[0-9]*: \([^:@]*\).*/\1/p' | grep -E 'flannel|cilium_vxlan'); do
		echo "Deleting old $link link" >&2
		run_with_sudo ip link delete "$link"
	done
}

# snapshotter: prints the snapshotter for the file system of $SNAP_COMMON
snapshotter() {
	if [ "$(stat -f -c %T "$SNAP_COMMON")" = zfs ]; then
		echo native
	else
		echo overlayfs
	fi
}

# remove_args FILE FLAG...: removes flags from args/FILE of this node
remove_args() {
	local file=$1 flag
	shift
	for flag in "$@"; do
		if grep -q -- "$flag" "$SNAP_DATA/args/$file"; then
			echo "Removing argument: $flag from $file"
			skip_opt_in_local_config "$flag" "$file"
		fi
	done
}

# get_opt_in_config --FLAG FILE: prints the value of a flag in args/FILE
get_opt_in_config() { "$SNAP/bin/microk8s" node-config get "$2" "$1"; }

# refresh_opt_in_local_config FLAG VALUE FILE: sets --FLAG=VALUE in args/FILE of this node
refresh_opt_in_local_config() { run_with_sudo "$SNAP/bin/microk8s" node-config set "$3" "--$1" "$2"; }

# refresh_opt_in_config FLAG VALUE FILE: the same on all nodes
refresh_opt_in_config() { run_with_sudo "$SNAP/bin/microk8s" node-config set-all "$3" "--$1" "$2"; }

# skip_opt_in_local_config FLAG FILE: removes --FLAG from args/FILE of this node
skip_opt_in_local_config() { run_with_sudo "$SNAP/bin/microk8s" node-config unset "$2" "--$1"; }

# skip_opt_in_config FLAG FILE: the same on all nodes
skip_opt_in_config() { run_with_sudo "$SNAP/bin/microk8s" node-config unset-all "$2" "--$1"; }

# restart_service NAME: on all nodes
restart_service() { run_with_sudo "$SNAP/bin/microk8s" node-config restart-all "$1"; }

# nodes_addon ADDON enable|disable: on all other nodes
nodes_addon() { run_with_sudo "$SNAP/bin/microk8s" node-config "$2-all" "$1"; }

# arch: prints this machine's architecture, as Debian calls it
arch() { "$SNAP/bin/microk8s" node-config arch; }

# is_strict: whether the snap is strictly confined
is_strict() { grep -q '^confinement: strict' "$SNAP/meta/snap.yaml"; }

# addon_name "NAME:ARG1;ARG2": prints NAME
addon_name() { echo "${1%%:*}"; }

# addon_arguments "NAME:ARG1;ARG2": prints ARG1 ARG2
addon_arguments() {
	case $1 in
	*:*) echo "${1#*:}" | cut -d: -f1 | tr ';' ' ' ;;
	*) echo ;;
	esac
}

# wait_for_service NAME: waits up to 30 seconds for a service of this node; prints "fail" if in vain
wait_for_service() { "$SNAP/bin/microk8s" node-config wait "$1" || echo fail; }

# wait_for_service_shutdown NAMESPACE LABELS: waits up to 30 seconds until no such pod is
# terminating; prints "fail" if in vain
wait_for_service_shutdown() {
	local end=$((SECONDS + 30))
	while "$SNAP/kubectl" --kubeconfig="$SNAP_DATA/credentials/client.config" get pods -n "$1" -l "$2" \
		-o jsonpath='{.items[*].metadata.deletionTimestamp}' 2>/dev/null | grep -q .; do
		if [ "$SECONDS" -ge "$end" ]; then
			echo fail
			return
		fi
		sleep 1
	done
}

# is_apiserver_ready: whether the API server of this node answers
is_apiserver_ready() {
	"$SNAP/kubectl" --kubeconfig="$SNAP_DATA/credentials/client.config" get --raw /readyz >/dev/null 2>&1
}

# valid_ip ADDRESS: whether it is an IPv4 address
valid_ip() {
	local part parts
	[[ $1 =~ ^[0-9]{1,3}(\.[0-9]{1,3}){3}$ ]] || return 1
	IFS=. read -ra parts <<<"$1"
	for part in "${parts[@]}"; do
		[ "$((10#$part))" -le 255 ] || return 1
	done
}

# get_default_ip: prints the address of the interface with the default route, or "none"
get_default_ip() {
	local device address
	device=$(ip -o route show default 2>/dev/null | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1)
	address=$(ip -o -4 address show dev "$device" 2>/dev/null | awk '{print $4}' | cut -d/ -f1 | head -n 1)
	echo "${address:-none}"
}

# get_ips: prints the addresses of this machine, with commas between, less link-local ones and those of the pod
# network; "none" if there are none
get_ips() {
	local found
	found=$(ip -o -4 address show 2>/dev/null | awk '$2 !~ /^(lo|vxlan.calico|flannel.1|cni0|ovn0)$/ {print $4}' | cut -d/ -f1 | grep -v '^169\.254\.' | paste -sd, -)
	echo "${found:-none}"
}

# fetch_as URL FILE: downloads
fetch_as() { curl -fL -o "$2" "$1"; }

# get_node: prints the names of the nodes that are ready, or "no_node_found" after a minute
get_node() {
	local end=$((SECONDS + 60)) nodes
	while :; do
		nodes=$("$SNAP/kubectl" --kubeconfig="$SNAP_DATA/credentials/client.config" get nodes --no-headers 2>/dev/null |
			awk '$2 ~ /^Ready/ {print $1}')
		if [ -n "$nodes" ]; then
			echo "$nodes"
			return
		fi
		if [ "$SECONDS" -ge "$end" ]; then
			echo no_node_found
			return
		fi
		sleep 2
	done
}

# use_manifest NAME apply|delete ["$(declare -p ARRAY)"]: applies or deletes NAME.yaml, a path or
# a file beside this folder, in which the keys of the array, and $ARCH, are replaced
use_manifest() {
	local file=$1.yaml action=$2 text key
	local -A items=()
	[[ $file == /* ]] || file=$SNAP/actions/$file
	if [ $# -ge 3 ]; then
		eval "items=${3#*=}"
	fi
	# shellcheck disable=SC2016 # the text itself is replaced
	items['$ARCH']=$(arch)
	text=$(<"$file") || return
	for key in "${!items[@]}"; do
		text=${text//"$key"/"${items[$key]}"}
	done
	"$SNAP/kubectl" --kubeconfig="$SNAP_DATA/credentials/client.config" "$action" -f - <<<"$text"
}

if [ "${BASH_SOURCE[0]}" = "$0" ] && [ $# -gt 0 ]; then
	"$@"
fi

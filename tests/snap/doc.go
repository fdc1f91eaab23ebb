// Package snap tests the packed snap on nested machines with systemd and a real snapd: see
// README.md in this folder. The file that it installs is the one that `make snap` has built.
package snap

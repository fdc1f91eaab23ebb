#!/usr/bin/env python3
"""Prints the first resolver configuration that pods can use: for hooks of addon repositories."""
import os
import sys

microk8s = os.path.join(os.environ.get("SNAP", "/snap/microk8s/current"), "bin/microk8s")
os.execv(microk8s, [microk8s, "find-resolv-conf", *sys.argv[1:]])

#!/usr/bin/env bash
# govulncheck 1.3.0, binary mode: the same program, once with its symbol table and once stripped
# (-ldflags "-s -w"), which links a module that the database knows a hole of. The first is "affected by 1
# vulnerability", exit code 3. For the stripped one the answer is "No vulnerabilities found", exit code 0;
# only -scan module finds it. Exits non-zero when that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
cd "$work"
export CGO_ENABLED=0 GOFLAGS=-mod=mod
mkdir tool program db db/index db/ID
(cd tool && go mod init tool >/dev/null 2>&1 && go get -tool golang.org/x/vuln/cmd/govulncheck@v1.3.0 >/dev/null 2>&1 && go build -o ../govulncheck golang.org/x/vuln/cmd/govulncheck)
cat >program/main.go <<'GO'
package main

import "golang.org/x/mod/semver"

func main() { println(semver.Compare("v1.0.0", "v2.0.0")) }
GO
(cd program && go mod init program >/dev/null 2>&1 && go get golang.org/x/mod@v0.17.0 >/dev/null 2>&1 && go build -o ../full . && go build -ldflags "-s -w" -o ../stripped .)
day=2099-01-01T00:00:00Z id=GO-2099-0001 module=golang.org/x/mod
echo "{\"modified\":\"$day\"}" >db/index/db.json
echo "[{\"path\":\"$module\",\"vulns\":[{\"id\":\"$id\",\"modified\":\"$day\"}]}]" >db/index/modules.json
echo "[{\"id\":\"$id\",\"modified\":\"$day\"}]" >db/index/vulns.json
cat >db/ID/$id.json <<JSON
{"schema_version":"1.3.1","id":"$id","modified":"$day","published":"$day","summary":"s","details":"d",
 "affected":[{"package":{"name":"$module","ecosystem":"Go"},
  "ranges":[{"type":"SEMVER","events":[{"introduced":"0"}]}],"ecosystem_specific":{}}],
 "database_specific":{"url":"https://pkg.go.dev/vuln/$id","review_status":"REVIEWED"}}
JSON
check() { # check WANTED_CODE WANTED_TEXT PROGRAM ARGS…
	local want=$1 text=$2 program=$3 code=0
	shift 3
	./govulncheck -db "file://$work/db" -mode binary "$@" "$program" >out 2>&1 || code=$?
	if [ "$code" -ne "$want" ] || ! grep -q "$text" out; then
		echo "changed: exit code $code:"
		cat out
		exit 1
	fi
}
check 3 "affected by 1 vulnerability" full
check 0 "No vulnerabilities found" stripped
check 3 "$id" stripped -scan module
echo "govulncheck 1.3.0: exit code 3 for a program, 0 for the same one stripped, 3 for that with -scan module"

// Package netcheck finds out whether the traffic of pods gets from node to node, with datagrams of the size of
// pods' packets through the tunnel itself, and whether the nodes' own ports are open to each other.
//
// Each kubelite answers on the address of its tunnel, where only other nodes and their pods reach it; whoever
// is no node gets no answer. What is asked and answered holds nothing that is secret, and an answer is as long as
// its question.
package netcheck

import (
	"bytes"
	"encoding/binary"
	"errors"

	"microk8s/internal/hostnet"
)

// Port is the UDP port, on the tunnel's address, at which a node answers.
const Port = hostnet.CheckPort

// ports are those that nodes open to each other, in the order of the bits of a [portSet].
var ports = []int{10250, 25000, 16443, 19001}

// portSet is a set of these ports.
type portSet byte

func (s portSet) has(i int) bool { return s&(1<<i) != 0 }

const (
	ping = 1
	pong = 2
)

// magic begins every message, with the protocol's version as its last byte.
var magic = []byte("mk8snet\x01")

// headerSize is the length of a message without its padding: magic, kind, asked, open, zero, nonce.
const headerSize = 8 + 4 + 8

// maxSize is the longest message: a pod's packet on a network with jumbo frames.
const maxSize = 9200

// message is a question, or its answer.
type message struct {
	kind  byte
	asked portSet // ports of the asking node that the other one is to dial, and has dialled
	open  portSet // those of them that it reached
	nonce uint64  // the question's
	size  int     // of the whole, padding included
}

var errMessage = errors.New("no message of a network check")

// marshal writes a message, padded to its size.
func (m message) marshal() []byte {
	out := make([]byte, max(m.size, headerSize))
	copy(out, magic)
	out[8], out[9], out[10] = m.kind, byte(m.asked), byte(m.open)
	binary.BigEndian.PutUint64(out[12:], m.nonce)
	return out
}

// unmarshal reads a message.
func unmarshal(data []byte) (m message, err error) {
	if len(data) < headerSize || len(data) > maxSize || !bytes.HasPrefix(data, magic) {
		return m, errMessage
	}
	m = message{kind: data[8], asked: portSet(data[9]), open: portSet(data[10]), nonce: binary.BigEndian.Uint64(data[12:]), size: len(data)}
	if m.kind != ping && m.kind != pong || m.asked >= 1<<len(ports) || m.open&^m.asked != 0 {
		return m, errMessage
	}
	return m, nil
}

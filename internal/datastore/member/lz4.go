package member

import (
	"errors"
	"fmt"
	"unsafe"
)

/*
#include <lz4frame.h>
*/
import "C"

// lz4Magic begins a compressed snapshot.
const lz4Magic = "\x04\x22\x4d\x18"

// checkSnapshotData decodes a snapshot, which compares the checksum at its end. Snapshots
// that are not compressed have none.
func checkSnapshotData(data []byte) error {
	if len(data) < len(lz4Magic) || string(data[:len(lz4Magic)]) != lz4Magic {
		return errFormat
	}
	var ctx *C.LZ4F_dctx
	if code := C.LZ4F_createDecompressionContext(&ctx, C.LZ4F_VERSION); C.LZ4F_isError(code) != 0 {
		return errors.New("cannot make a decoder")
	}
	defer C.LZ4F_freeDecompressionContext(ctx)
	out := make([]byte, 1<<20)
	for len(data) > 0 {
		in, room := C.size_t(len(data)), C.size_t(len(out))
		left := C.LZ4F_decompress(ctx, unsafe.Pointer(&out[0]), &room, unsafe.Pointer(&data[0]), &in, nil)
		if C.LZ4F_isError(left) != 0 {
			return fmt.Errorf("its data is wrong: %s", C.GoString(C.LZ4F_getErrorName(left)))
		}
		data = data[in:]
		if left == 0 {
			if len(data) > 0 {
				return errors.New("it goes on after its end")
			}
			return nil
		}
		if in == 0 && room == 0 {
			break
		}
	}
	return errors.New("it ends too early")
}

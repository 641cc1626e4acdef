package op

import (
	"bytes"
	"encoding/json"
	"reflect"
)

// sameJSON reports whether two texts are the same JSON value, whatever the order
// of their members.
func sameJSON(a, b json.RawMessage) bool {
	if bytes.Equal(a, b) {
		return true
	}
	x, err := decode(a)
	if err != nil {
		return false
	}
	y, err := decode(b)
	return err == nil && reflect.DeepEqual(x, y)
}

func decode(b json.RawMessage) (any, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber() // a byte count may need more digits than a float64 has
	var v any
	err := d.Decode(&v)
	return v, err
}

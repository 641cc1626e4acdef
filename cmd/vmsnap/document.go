package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// object is a JSON object that keeps its order.
type object []member

type member struct {
	key   string
	value any
}

// MarshalJSON writes the members in their order.
func (o object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		key, err := marshal(m.key)
		if err != nil {
			return nil, err
		}
		value, err := marshal(m.value)
		if err != nil {
			return nil, err
		}
		b.Write(key)
		b.WriteByte(':')
		b.Write(value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// marshal is json.Marshal for readers that are no browsers: "<" stays "<".
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// encode returns a document as indented JSON, by the rules of the package's
// documentation.
func encode(document any) ([]byte, error) {
	if m, ok := document.(proto.Message); ok {
		document = plain(m.ProtoReflect())
	}
	text, err := marshal(document)
	if err != nil {
		return nil, fmt.Errorf("print as JSON: %w", err)
	}
	var b bytes.Buffer
	if err := json.Indent(&b, text, "", "  "); err != nil {
		return nil, fmt.Errorf("print as JSON: %w", err)
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// plain returns a message as what encoding/json prints by our rules.
func plain(m protoreflect.Message) any {
	switch known := m.Interface().(type) {
	case *timestamppb.Timestamp:
		return known.AsTime().Format(time.RFC3339Nano)
	case *durationpb.Duration:
		return seconds(known.AsDuration())
	}
	var o object
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		o = append(o, member{string(fd.Name()), field(m, fd)})
	}
	return o
}

// seconds prints a duration as Protobuf's JSON does.
func seconds(d time.Duration) string {
	text := fmt.Sprintf("%d.%09d", d/time.Second, d%time.Second)
	return strings.TrimSuffix(strings.TrimRight(text, "0"), ".") + "s"
}

func field(m protoreflect.Message, fd protoreflect.FieldDescriptor) any {
	value := m.Get(fd)
	switch {
	case fd.IsMap():
		return entries(value.Map(), fd.MapValue())
	case fd.IsList():
		list := make([]any, value.List().Len())
		for i := range list {
			list[i] = single(value.List().Get(i), fd)
		}
		return list
	case fd.HasPresence() && !m.Has(fd):
		return nil
	default:
		return single(value, fd)
	}
}

func entries(values protoreflect.Map, fd protoreflect.FieldDescriptor) object {
	o := object{}
	for key, value := range values.Range {
		o = append(o, member{key.String(), single(value, fd)})
	}
	slices.SortFunc(o, func(a, b member) int { return strings.Compare(a.key, b.key) })
	return o
}

func single(value protoreflect.Value, fd protoreflect.FieldDescriptor) any {
	switch {
	case fd.Message() != nil:
		return plain(value.Message())
	case fd.Enum() != nil:
		return enumWord(fd.Enum(), value.Enum())
	default:
		return value.Interface()
	}
}

// enumWord returns an enumeration's value as a word: VM_STATE_RUNNING is
// "running". The first value, by its name, gives the prefix and means nothing.
func enumWord(ed protoreflect.EnumDescriptor, n protoreflect.EnumNumber) string {
	value := ed.Values().ByNumber(n)
	if value == nil {
		return fmt.Sprint(n) // of a daemon newer than this command
	}
	if n == 0 {
		return ""
	}
	prefix := strings.TrimSuffix(string(ed.Values().ByNumber(0).Name()), "UNSPECIFIED")
	name := strings.TrimPrefix(string(value.Name()), prefix)
	return strings.ReplaceAll(strings.ToLower(name), "_", "-")
}

// word returns the word of a value of any of the API's enumerations.
func word(e protoreflect.Enum) string { return enumWord(e.Descriptor(), e.Number()) }

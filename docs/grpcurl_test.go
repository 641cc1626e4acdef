package docs_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	reflectpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// grpcurl stands in for the program of that name, which takes a minute to
// build. It takes the flags and arguments that the documents use and refuses all
// others, knows only the messages that the daemon tells by reflection, and calls
// as that program does.
func grpcurl(args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("grpcurl", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // its error says it
	plaintext := flags.Bool("plaintext", false, "")
	data := flags.String("d", "", "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if !*plaintext || flags.NArg() != 2 || !strings.HasPrefix(flags.Arg(0), "unix:///") {
		return fmt.Errorf("not what this stands in for: %q", args)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	conn, err := grpc.NewClient(flags.Arg(0), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if flags.Arg(1) == "list" {
		return listServices(ctx, conn, stdout)
	}
	method, err := findMethod(ctx, conn, flags.Arg(1))
	if err != nil {
		return err
	}
	return callMethod(ctx, conn, method, *data, stdout)
}

// reflection asks the daemon one question about its API.
func reflection(ctx context.Context, conn *grpc.ClientConn, question *reflectpb.ServerReflectionRequest) (*reflectpb.ServerReflectionResponse, error) {
	stream, err := reflectpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(question); err != nil {
		return nil, err
	}
	answer, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	if e := answer.GetErrorResponse(); e != nil {
		return nil, errors.New(e.GetErrorMessage())
	}
	return answer, stream.CloseSend()
}

func listServices(ctx context.Context, conn *grpc.ClientConn, stdout io.Writer) error {
	answer, err := reflection(ctx, conn, &reflectpb.ServerReflectionRequest{
		MessageRequest: &reflectpb.ServerReflectionRequest_ListServices{},
	})
	if err != nil {
		return err
	}
	var names []string
	for _, service := range answer.GetListServicesResponse().GetService() {
		names = append(names, service.GetName())
	}
	slices.Sort(names)
	_, err = fmt.Fprintln(stdout, strings.Join(names, "\n"))
	return err
}

// findMethod returns what the daemon tells of a SERVICE/METHOD.
func findMethod(ctx context.Context, conn *grpc.ClientConn, symbol string) (protoreflect.MethodDescriptor, error) {
	service, name, _ := strings.Cut(symbol, "/")
	answer, err := reflection(ctx, conn, &reflectpb.ServerReflectionRequest{
		MessageRequest: &reflectpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service},
	})
	if err != nil {
		return nil, err
	}
	var set descriptorpb.FileDescriptorSet
	for _, raw := range answer.GetFileDescriptorResponse().GetFileDescriptorProto() {
		var file descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal(raw, &file); err != nil {
			return nil, err
		}
		set.File = append(set.File, &file)
	}
	files, err := protodesc.NewFiles(&set)
	if err != nil {
		return nil, err
	}
	found, err := files.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil {
		return nil, err
	}
	if method := found.(protoreflect.ServiceDescriptor).Methods().ByName(protoreflect.Name(name)); method != nil {
		return method, nil
	}
	return nil, fmt.Errorf("%s has no method %q", service, name)
}

// callMethod sends JSON and prints each answer as JSON.
func callMethod(ctx context.Context, conn *grpc.ClientConn, method protoreflect.MethodDescriptor, data string, stdout io.Writer) error {
	req := dynamicpb.NewMessage(method.Input())
	if err := protojson.Unmarshal([]byte(data), req); err != nil {
		return err
	}
	procedure := fmt.Sprintf("/%s/%s", method.Parent().FullName(), method.Name())
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, procedure)
	if err != nil {
		return err
	}
	if err := errors.Join(stream.SendMsg(req), stream.CloseSend()); err != nil {
		return err
	}
	for {
		res := dynamicpb.NewMessage(method.Output())
		if err := stream.RecvMsg(res); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		_, _ = fmt.Fprintln(stdout, protojson.Format(res))
	}
}

// runGRPCurl is the main function of this program when it is called grpcurl.
func runGRPCurl() int {
	if err := grpcurl(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "grpcurl:", err)
		return 1
	}
	return 0
}

// TestGRPCurlRefuses has what would be wrong in a document fail.
func TestGRPCurlRefuses(t *testing.T) {
	for _, args := range [][]string{
		{"-plaintext", "-unix", "/run/vmsnap/vmsnapd.sock", "list"}, // fails in the releases 1.9.2 and 1.9.3
		{"-plaintext", "/run/vmsnap/vmsnapd.sock", "list"},
		{"unix:///run/vmsnap/vmsnapd.sock", "list"},
		{"-plaintext", "unix:///run/vmsnap/vmsnapd.sock", "-d", "{}", "vmsnap.v1.VMService/GetVM"}, // flags come first
		{"-plaintext", "unix:///nowhere", "list"},
	} {
		if err := grpcurl(args, io.Discard); err == nil {
			t.Errorf("%q is taken", args)
		}
	}
}

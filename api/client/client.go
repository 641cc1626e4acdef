package client

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/vmsnap/vmsnap/api/vmsnap/v1/vmsnapv1connect"
)

// DefaultSocket is where vmsnapd listens unless it is configured otherwise.
const DefaultSocket = "/run/vmsnap/vmsnapd.sock"

// The deadlines of the connection; those of calls are their contexts'.
const (
	// A Unix socket accepts at once, or its queue is full since the daemon hangs.
	dialTimeout = 5 * time.Second
	// A daemon that has said nothing for so long is asked whether it is alive …
	pingAfter = 15 * time.Second
	// … and the connection is given up when it does not answer.
	pingTimeout = 15 * time.Second
)

// baseURL is what requests are addressed to; the host is not looked at.
const baseURL = "http://vmsnapd"

// Client is a client of one daemon.
type Client struct {
	socket     string
	http       *http.Client
	transport  *http.Transport
	vms        vmsnapv1connect.VMServiceClient
	snapshots  vmsnapv1connect.SnapshotServiceClient
	operations vmsnapv1connect.OperationServiceClient
	events     vmsnapv1connect.EventServiceClient
	schedules  vmsnapv1connect.ScheduleServiceClient
}

// New returns a client of the daemon that listens at a socket. It connects
// with the first call, and again after each loss of the connection.
func New(socket string) *Client {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{
		DisableCompression: true,
		Protocols:          protocols,
		HTTP2:              &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			dialer := net.Dialer{Timeout: dialTimeout}
			conn, err := dialer.DialContext(ctx, "unix", socket)
			if err != nil {
				return nil, &UnreachableError{Socket: socket, Err: err}
			}
			return conn, nil
		},
	}
	c := &http.Client{Transport: transport}
	// A Unix socket has bandwidth to spare; compressing only takes time.
	plain := connect.WithAcceptCompression("gzip", nil, nil)
	return &Client{
		socket:     socket,
		http:       c,
		transport:  transport,
		vms:        vmsnapv1connect.NewVMServiceClient(c, baseURL, plain),
		snapshots:  vmsnapv1connect.NewSnapshotServiceClient(c, baseURL, plain),
		operations: vmsnapv1connect.NewOperationServiceClient(c, baseURL, plain),
		events:     vmsnapv1connect.NewEventServiceClient(c, baseURL, plain),
		schedules:  vmsnapv1connect.NewScheduleServiceClient(c, baseURL, plain),
	}
}

// Socket returns the path of the daemon's socket.
func (c *Client) Socket() string { return c.socket }

// VMs returns the client of the VMService.
func (c *Client) VMs() vmsnapv1connect.VMServiceClient { return c.vms }

// Snapshots returns the client of the SnapshotService.
func (c *Client) Snapshots() vmsnapv1connect.SnapshotServiceClient { return c.snapshots }

// Operations returns the client of the OperationService.
func (c *Client) Operations() vmsnapv1connect.OperationServiceClient { return c.operations }

// Events returns the client of the EventService.
func (c *Client) Events() vmsnapv1connect.EventServiceClient { return c.events }

// Schedules returns the client of the ScheduleService.
func (c *Client) Schedules() vmsnapv1connect.ScheduleServiceClient { return c.schedules }

// Close closes the connection when no call uses it. The client can be used
// again; it will connect anew.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Version asks the daemon for its version. Any peer may ask.
func (c *Client) Version(ctx context.Context) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, baseURL+"/grpc.health.v1.Health/Check", strings.NewReader("{}"))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := c.http.Do(req)
	if err != nil {
		return "", fmt.Errorf("ask vmsnapd for its version: %w", err)
	}
	defer func() { _ = res.Body.Close() }()
	name, version, _ := strings.Cut(res.Header.Get("Server"), "/")
	if name != "vmsnapd" {
		return "", fmt.Errorf("what listens at %s is not vmsnapd", c.socket)
	}
	return version, nil
}

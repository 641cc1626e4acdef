package event

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// sendTimeout bounds one request: a receiver that takes longer should take the
// event and work on it afterwards.
const sendTimeout = 10 * time.Second

// maxAnswer is how much of an answer is read: some of it, so that the connection
// can be used again.
const maxAnswer = 64 << 10

// The headers of a request.
const (
	SeqHeader       = "Vmsnap-Event"     // the event's number: the same one again is a repetition
	TimeHeader      = "Vmsnap-Timestamp" // seconds since 1970 UTC, when it was sent
	SignatureHeader = "Vmsnap-Signature" // "sha256=" and Sign's result; only with a secret
)

// Webhook posts events to an HTTP server as JSON. An answer of 2xx takes the
// event; one of 4xx, but for 408 and 429, refuses it for good.
type Webhook struct {
	url    string
	secret []byte
	host   string
	client *http.Client
	now    func() time.Time
}

// NewWebhook returns a sink that posts to a URL. With a secret it signs. The
// host is named in each event.
func NewWebhook(address string, secret []byte, host string) (*Webhook, error) {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("%q is not a URL of http or https", address)
	}
	return &Webhook{
		url: address, secret: secret, host: host, now: time.Now,
		client: &http.Client{
			Timeout: sendTimeout,
			// An event is not for whoever a receiver names.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// Name implements Sink.
func (*Webhook) Name() string { return "webhook" }

// Send implements Sink.
func (w *Webhook) Send(ctx context.Context, e Event) error {
	body, err := w.body(e)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	sent := strconv.FormatInt(w.now().Unix(), 10)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "vmsnapd")
	req.Header.Set(SeqHeader, strconv.FormatUint(e.Seq, 10))
	req.Header.Set(TimeHeader, sent)
	if len(w.secret) > 0 {
		req.Header.Set(SignatureHeader, "sha256="+Sign(w.secret, sent, body))
	}
	res, err := w.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, maxAnswer)) // only for the connection's sake
	switch {
	case res.StatusCode/100 == 2:
		return nil
	case res.StatusCode/100 == 4 && res.StatusCode != http.StatusRequestTimeout && res.StatusCode != http.StatusTooManyRequests:
		return fmt.Errorf("%w: %s", ErrRefused, res.Status)
	default:
		return fmt.Errorf("answered %s", res.Status)
	}
}

// Sign returns the signature of a request, in hexadecimal digits: HMAC-SHA256 of
// the timestamp, a dot and the body.
func Sign(secret []byte, timestamp string, body []byte) string {
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(timestamp + "."))
	mac.Write(body)
	return hex.EncodeToString(mac.Sum(nil))
}

// body returns an event as it is posted. The names are those of the API.
func (w *Webhook) body(e Event) ([]byte, error) {
	return json.Marshal(struct {
		Host        string    `json:"host"`
		Seq         uint64    `json:"seq"`
		Time        time.Time `json:"time"`
		Kind        Kind      `json:"kind"`
		Severity    Severity  `json:"severity"`
		VMID        string    `json:"vm_id"`
		VMName      string    `json:"vm_name"`
		OperationID string    `json:"operation_id"`
		SnapshotID  string    `json:"snapshot_id"`
		Schedule    string    `json:"schedule"`
		UID         *uint32   `json:"uid"`
		Disk        string    `json:"disk"`
		Code        string    `json:"code"`
		Result      string    `json:"result"`
		Message     string    `json:"message"`
	}{
		w.host, e.Seq, e.Time.UTC(), e.Kind, e.Severity, e.VMID, e.VMName, e.Operation, e.Snapshot, e.Schedule,
		e.UID, e.Disk, e.Code, e.Result, e.Message,
	})
}

package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/vmsnap/vmsnap/internal/testvm"
)

// write puts a file into the host's directory.
func (h *host) write(name string, data []byte) (path string) {
	h.t.Helper()
	path = h.path(name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		h.t.Fatal(err)
	}
	return path
}

// certificate makes a certificate for 127.0.0.1, which vouches for itself.
func (h *host) certificate() (cert, key string) {
	h.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		h.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "vmsnapd"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		h.t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		h.t.Fatal(err)
	}
	return h.write("metrics.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		h.write("metrics.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}))
}

// prometheus is a Prometheus that scrapes the daemon over TLS with a password,
// and reads our rules.
type prometheus struct {
	h   *host
	url string
}

// scraped starts a Prometheus, which ends with the test.
func (h *host) scraped(cert, password string) prometheus {
	h.t.Helper()
	rules, err := filepath.Abs("../../packaging/prometheus/vmsnap.rules.yml")
	if err != nil {
		h.t.Fatal(err)
	}
	config := h.write("prometheus.yml", fmt.Appendf(nil, `
global: {scrape_interval: 250ms, scrape_timeout: 250ms, evaluation_interval: 250ms}
rule_files: [%s]
scrape_configs:
  - job_name: vmsnap
    scheme: https
    tls_config: {ca_file: %s}
    basic_auth: {username: prometheus, password: %s}
    static_configs: [{targets: ["%s"]}]
`, rules, cert, password, h.metrics))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		h.t.Fatal(err)
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		h.t.Fatal(err)
	}
	log, err := os.Create(h.path("prometheus.log"))
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command("prometheus", "--config.file="+config, "--storage.tsdb.path="+h.path("tsdb"), "--web.listen-address="+address)
	cmd.Stdout, cmd.Stderr = log, log
	if err := errors.Join(cmd.Start(), log.Close()); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			h.t.Errorf("prometheus: %v\n%s", err, logFile(h.path("prometheus.log")))
		}
	})
	return prometheus{h, "http://" + address}
}

// get asks the API of Prometheus.
func (p prometheus) get(path string, into any) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+path, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	return json.NewDecoder(res.Body).Decode(into)
}

// value returns what an expression comes to, which has to be one number.
func (p prometheus) value(expr string) (float64, error) {
	var answer struct {
		Data struct {
			Result []struct {
				Value [2]any `json:"value"`
			} `json:"result"`
		} `json:"data"`
	}
	if err := p.get("/api/v1/query?query="+url.QueryEscape(expr), &answer); err != nil {
		return 0, err
	}
	if len(answer.Data.Result) != 1 {
		return 0, fmt.Errorf("%s has %d values", expr, len(answer.Data.Result))
	}
	text, _ := answer.Data.Result[0].Value[1].(string)
	return strconv.ParseFloat(text, 64)
}

// awaits waits until an expression has a value.
func (p prometheus) awaits(expr string, want float64) {
	p.h.t.Helper()
	p.h.eventually(eventLimit, fmt.Sprintf("%s is %g", expr, want), func() error {
		got, err := p.value(expr)
		if err == nil && got != want {
			err = fmt.Errorf("it is %g", got)
		}
		return err
	})
}

// rulesAreWell waits until every rule was evaluated without an error.
func (p prometheus) rulesAreWell() {
	p.h.t.Helper()
	p.h.eventually(eventLimit, "the rules are evaluated", func() error {
		var answer struct {
			Data struct {
				Groups []struct {
					Rules []struct{ Name, Health, LastError string } `json:"rules"`
				} `json:"groups"`
			} `json:"data"`
		}
		if err := p.get("/api/v1/rules", &answer); err != nil {
			return err
		}
		if len(answer.Data.Groups) == 0 {
			return errors.New("there are none")
		}
		for _, g := range answer.Data.Groups {
			for _, r := range g.Rules {
				if r.Health != "ok" {
					return fmt.Errorf("%s is %s: %s", r.Name, r.Health, r.LastError)
				}
			}
		}
		return nil
	})
}

// TestQEMUPrometheus has a Prometheus of Debian's scrape the daemon over TLS, with
// a password, while a snapshot is taken.
func TestQEMUPrometheus(t *testing.T) {
	testvm.OnOneQEMU(t, func(t *testing.T, q testvm.QEMU) {
		vm := newStill(t, q, "scraped", "root.qcow2")
		h := prepareHost(t)
		cert, key := h.certificate()
		hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		web := h.write("web.yml", fmt.Appendf(nil, "tls_server_config: {cert_file: %s, key_file: %s}\nbasic_auth_users: {prometheus: %s}\n", cert, key, hash))
		h.flags = []string{"--metrics-config", web}
		h.list(vm.name, vm.uuid)
		h.start()
		t.Cleanup(h.end)
		h.await(vm.name, "paused")
		p := h.scraped(cert, "secret")
		p.awaits(`up{job="vmsnap"}`, 1)
		p.awaits(`sum(vmsnap_operations_total{kind="snapshot", result="succeeded"})`, 0)
		p.awaits(`vmsnap_disk_chain_layers{vm="scraped", disk="root"}`, 1)
		p.awaits(`vmsnap_guest_paused{vm="scraped"}`, 1)
		before := time.Now()
		h.must("snapshot", "create", vm.name, "one", "--quiesce", "none")
		p.awaits(`sum(vmsnap_operations_total{kind="snapshot", result="succeeded"})`, 1)
		p.awaits(`vmsnap_disk_chain_layers{vm="scraped", disk="root"}`, 2)
		p.awaits(`vmsnap_disk_active_layer_bytes{vm="scraped", disk="root"} > bool 0`, 1)
		p.awaits(`vmsnap_disk_free_bytes{vm="scraped", disk="root"} > bool 0`, 1)
		p.awaits(fmt.Sprintf(`abs(vmsnap_vm_last_snapshot_timestamp_seconds{vm="scraped"} - %d) < bool 60`, before.Unix()), 1)
		p.awaits(`time() - vmsnap_schedule_look_timestamp_seconds < bool 60`, 1)
		p.awaits(`count(vmsnap_collector_success == 0) or vector(0)`, 0)
		p.rulesAreWell()
		vm.kill()
		p.awaits(`count(vmsnap_monitor_up{vm="scraped"}) or vector(0)`, 0)
	})
}

// TestMetricsAreKeptFromOthers scrapes without TLS, and without the password.
func TestMetricsAreKeptFromOthers(t *testing.T) {
	h := prepareHost(t)
	cert, key := h.certificate()
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	h.flags = []string{"--metrics-config", h.write("web.yml",
		fmt.Appendf(nil, "tls_server_config: {cert_file: %s, key_file: %s}\nbasic_auth_users: {prometheus: %s}\n", cert, key, hash))}
	h.start()
	t.Cleanup(h.end)
	scrape := func(url, password string, want string) {
		t.Helper()
		out, err := exec.CommandContext(h.ctx(), "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--cacert", cert, "-u", "prometheus:"+password, url).CombinedOutput()
		if string(out) != want {
			t.Errorf("%s with the password %q: %q, %v; want %q", url, password, out, err, want)
		}
	}
	h.eventually(eventLimit, "the metrics are served", func() error {
		conn, err := net.Dial("tcp", h.metrics)
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	scrape("https://"+h.metrics+"/metrics", "secret", "200")
	scrape("https://"+h.metrics+"/metrics", "wrong", "401")
	scrape("http://"+h.metrics+"/metrics", "secret", "400") // Go's TLS answers plain HTTP so
}

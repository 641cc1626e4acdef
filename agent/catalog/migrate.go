package catalog

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/go-hclog"

	"github.com/vmsnap/vmsnap/agent/fault"
)

// applicationID marks a database as a vmsnap catalog: "vmsn".
const applicationID = 0x766d736e

//go:embed migrations/*.sql
var migrations embed.FS

// step brings the database from the format before it to its own.
type step struct {
	name string
	sql  string
}

// embeddedSteps returns the steps of this program, the first one first.
func embeddedSteps() ([]step, error) {
	names, err := fs.Glob(migrations, "migrations/*.sql") // sorted
	if err != nil {
		return nil, err
	}
	steps := make([]step, 0, len(names))
	for i, name := range names {
		base := filepath.Base(name)
		if !strings.HasPrefix(base, fmt.Sprintf("%04d_", i+1)) {
			return nil, fmt.Errorf("migration %s is out of order", base)
		}
		b, err := migrations.ReadFile(name)
		if err != nil {
			return nil, err
		}
		steps = append(steps, step{base, string(b)})
	}
	return steps, nil
}

// migrate checks the database and brings it to the format of the last step.
func migrate(ctx context.Context, db *sql.DB, path string, steps []step, log hclog.Logger) error {
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	version, err := formatOf(ctx, conn, path)
	if err != nil {
		return err
	}
	if version > len(steps) {
		return fault.New(fault.Unsupported, "catalog %s has the format %d, and this program knows none above %d",
			path, version, len(steps)).WithHint("run the vmsnapd that wrote it, or a newer one")
	}
	if _, err := conn.ExecContext(ctx, "PRAGMA journal_mode = WAL"); err != nil {
		return err
	}
	if err := quickCheck(ctx, conn, path); err != nil {
		return err
	}
	if version > 0 && version < len(steps) {
		backup, err := backUp(ctx, conn, path, version)
		if err != nil {
			return fmt.Errorf("back up the catalog before its migration: %w", err)
		}
		log.Info("catalog was backed up before its migration", "backup", backup)
	}
	for v := version; v < len(steps); v++ {
		if err := apply(ctx, conn, steps[v], v+1); err != nil {
			return fmt.Errorf("migrate the catalog to format %d (%s): %w", v+1, steps[v].name, err)
		}
		log.Info("catalog was migrated", "format", v+1)
	}
	return nil
}

// formatOf returns the number of the database's format, 0 when it is empty.
func formatOf(ctx context.Context, conn *sql.Conn, path string) (int, error) {
	var application, version, tables int
	for query, into := range map[string]*int{
		"PRAGMA application_id":              &application,
		"PRAGMA user_version":                &version,
		"SELECT count(*) FROM sqlite_schema": &tables,
	} {
		if err := conn.QueryRowContext(ctx, query).Scan(into); err != nil {
			return 0, err
		}
	}
	if application != applicationID && (application != 0 || version != 0 || tables != 0) {
		return 0, fault.New(fault.Denied, "%s is a database of another program", path).
			WithHint("give vmsnapd a state directory of its own")
	}
	return version, nil
}

// quickCheck reads through the whole database.
func quickCheck(ctx context.Context, conn *sql.Conn, path string) error {
	rows, err := conn.QueryContext(ctx, "PRAGMA quick_check(10)")
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }()
	var found []string
	for rows.Next() {
		var line string
		if err := rows.Scan(&line); err != nil {
			return err
		}
		if line != "ok" {
			found = append(found, line)
		}
	}
	if err := rows.Err(); err != nil {
		return err
	}
	if len(found) > 0 {
		return damaged(path, errors.New(strings.Join(found, "; ")))
	}
	return nil
}

// backUp copies the database beside itself and returns the copy's path.
func backUp(ctx context.Context, conn *sql.Conn, path string, version int) (string, error) {
	dir := filepath.Dir(path)
	target := filepath.Join(dir, fmt.Sprintf("catalog.v%d.db", version))
	temporary := target + ".new"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if _, err := conn.ExecContext(ctx, "VACUUM INTO ?", temporary); err != nil {
		return "", err
	}
	if err := syncFile(temporary); err != nil {
		return "", err
	}
	if err := os.Rename(temporary, target); err != nil {
		return "", err
	}
	return target, syncDir(dir)
}

// syncFile makes a file private and durable.
func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Chmod(0o600), f.Sync(), f.Close())
}

// apply makes one step in one transaction. Foreign keys are off meanwhile and
// checked at its end: with them on, rebuilding a table, SQLite's way to change
// one, would first delete everything that refers to it.
func apply(ctx context.Context, conn *sql.Conn, s step, version int) (err error) {
	if _, err := conn.ExecContext(ctx, "PRAGMA foreign_keys = OFF"); err != nil {
		return err
	}
	defer func() {
		_, onErr := conn.ExecContext(context.WithoutCancel(ctx), "PRAGMA foreign_keys = ON")
		err = errors.Join(err, onErr)
	}()
	tx, err := conn.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // after a commit it does nothing
	if _, err := tx.ExecContext(ctx, s.sql); err != nil {
		return err
	}
	if err := checkReferences(ctx, tx); err != nil {
		return err
	}
	marks := fmt.Sprintf("PRAGMA application_id = %d; PRAGMA user_version = %d", applicationID, version)
	if _, err := tx.ExecContext(ctx, marks); err != nil {
		return err
	}
	return tx.Commit()
}

// checkReferences fails when a row refers to one that is not there.
func checkReferences(ctx context.Context, tx *sql.Tx) error {
	var broken int
	if err := tx.QueryRowContext(ctx, "SELECT count(*) FROM pragma_foreign_key_check").Scan(&broken); err != nil {
		return err
	}
	if broken > 0 {
		return fmt.Errorf("%d rows refer to rows that are not there", broken)
	}
	return nil
}

package place

import (
	"fmt"

	"github.com/minio/minio-go/v7/pkg/credentials"
)

// ReadKeys reads the keys of an S3 server from a file in the form of ~/.aws/credentials, profile
// default.
func ReadKeys(file string) (Keys, error) {
	v, err := credentials.NewFileAWSCredentials(file, "default").GetWithContext(nil)
	if err != nil {
		return Keys{}, fmt.Errorf("cannot read the keys of the S3 server from %s: %w; it must have a section [default] with aws_access_key_id and aws_secret_access_key", file, err)
	}
	if v.AccessKeyID == "" || v.SecretAccessKey == "" {
		return Keys{}, fmt.Errorf("%s lacks aws_access_key_id or aws_secret_access_key below [default]", file)
	}
	return Keys{ID: v.AccessKeyID, Secret: v.SecretAccessKey}, nil
}
